"""A backbone is whole: every weight came from its checkpoint, and every one is a number.

transformers fills what a checkpoint lacks with random numbers and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from st_embfilter.errors import BackboneError
from st_embfilter.text import shown

#: Heads on top of the hidden states, of which a language model's checkpoint has none.
_UNUSED: Final = frozenset({"pooler", "pooling_layer", "classifier"})


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Makes `from_pretrained` of transformers, in this thread, refuse a checkpoint with gaps.

    Both of its callers here are classes of sentence-transformers, which hand on no loading info.

    Raises:
        BackboneError: From inside, if a weight of the model is missing or of another shape.
    """
    thread = get_ident()
    original = PreTrainedModel.__dict__["from_pretrained"]

    def checked(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread or kwargs.get("output_loading_info"):
            return original.__func__(cls, *args, **kwargs)
        kwargs["ignore_mismatched_sizes"] = True  # they are named below instead
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        _check_info(info, str(args[0] if args else ""))
        return model

    owner: Any = PreTrainedModel
    owner.from_pretrained = classmethod(checked)
    try:
        yield
    finally:
        owner.from_pretrained = original


def check_finite(model: nn.Module, name: str) -> None:
    """Checks that every weight of a model is a finite number; one pass over them.

    Args:
        model: A transformers model.
        name: Name of the model, for the error.

    Raises:
        BackboneError: Names the weights that hold NaN or infinity.
    """
    bad = [key for key, value in model.named_parameters() if not is_finite(value)]
    if bad:
        raise BackboneError(
            f"every weight of a model must be a finite number, got NaN or infinity in {_some(bad)} "
            f"of {name}; the checkpoint is damaged, download it again"
        )


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor, real and of any shape, holds neither NaN nor infinity; one pass over it."""
    if value.device.type == "meta" or value.numel() == 0 or value.dtype.itemsize < 2:
        return True
    low, high = torch.aminmax(value.detach())  # each is NaN if any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _check_info(info: Mapping[str, Any], name: str) -> None:
    missing = sorted(key for key in info["missing_keys"] if not _UNUSED & set(key.split(".")))
    other = sorted(item[0] for item in info["mismatched_keys"])
    for keys, what in ((missing, "is not stored"), (other, "is stored in another shape")):
        if keys:
            raise BackboneError(
                f"a checkpoint must hold every weight of its model, got one in which {_some(keys)} "
                f"{what}, in {name}; the checkpoint is damaged or of another model"
            )


def _some(names: list[str]) -> str:
    listed = ", ".join(shown(name, 100) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""A backbone is whole: every weight came from its checkpoint, and every one is a number.

transformers fills what a checkpoint lacks with random numbers and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

from st_embfilter.errors import BackboneError, UnembeddingError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.tensors import open_checkpoint
from st_embfilter.text import shown
from st_embfilter.unembedding.head import stored_name

#: Heads on top of the hidden states, of which a language model's checkpoint has none.
_UNUSED: Final = frozenset({"pooler", "pooling_layer", "classifier"})

_RESHAPED: Final = "is stored in another shape"


@contextmanager
def loaded_whole(files: ModelFiles) -> Iterator[None]:
    """Makes `from_pretrained` of transformers, in this thread, refuse a checkpoint with gaps.

    Both of its callers here are classes of sentence-transformers, which hand on no loading info.

    Args:
        files: Of the model, to name what has another shape.

    Raises:
        BackboneError: From inside, if a weight of the model is missing or of another shape.
    """
    thread = get_ident()
    original = PreTrainedModel.__dict__["from_pretrained"]

    def checked(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread or kwargs.get("output_loading_info"):
            return original.__func__(cls, *args, **kwargs)
        name = str(args[0] if args else "")
        try:
            model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            # To ignore them would make them up, of whatever size the config says.
            raise _gap(_other_shapes(cls, kwargs.get("config"), files), _RESHAPED, name) from error
        missing = (key for key in info["missing_keys"] if not _UNUSED & set(key.split(".")))
        names = sorted(missing)
        if names:
            raise _gap(names, "is not stored", name)
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
    # Computed from the configuration, such as the angles of RoPE; masks hold -infinity.
    bad += [
        key
        for key, value in model.named_buffers()
        if value.is_floating_point() and not is_finite(value.clamp(min=0))
    ]
    if bad:
        raise BackboneError(
            f"every weight of a model must be a finite number, got NaN or infinity in {_some(bad)} "
            f"of {name}; the checkpoint or its configuration is damaged, download it again"
        )


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor, real and of any shape, holds neither NaN nor infinity; one pass over it."""
    if value.device.type == "meta" or value.numel() == 0 or value.dtype.itemsize < 2:
        return True
    low, high = torch.aminmax(value.detach())  # each is NaN if any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _gap(names: list[str], what: str, model: str) -> BackboneError:
    return BackboneError(
        f"a checkpoint must hold every weight of its model, got one in which {_some(names)} "
        f"{what}, in {model}; the checkpoint is damaged or of another model"
    )


def _other_shapes(kind: Any, config: Any, files: ModelFiles) -> list[str]:
    """Names of the parameters of a model that its checkpoint holds in another shape."""
    with torch.device("meta"):
        model: nn.Module = kind(config)
    checkpoint = open_checkpoint(files)
    found = []
    for name, value in model.named_parameters():
        with suppress(UnembeddingError):  # it is not stored, or no matrix
            stored = checkpoint.tensor(stored_name(model, checkpoint, name)).shape
            shape = tuple(value.shape) if value.ndim > 1 else (value.numel(), 1)
            if stored != shape:
                found.append(name)
    return sorted(found) or ["a weight"]


def _some(names: list[str]) -> str:
    listed = ", ".join(shown(name, 100) for name in names[:3])
    return listed + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""The modules of a model in their order: where a filter goes, and putting one there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module, Pooling
from torch import nn

from st_embfilter.errors import PlacementError
from st_embfilter.model.layer import check_placement, filter_of


def filter_position(model: SentenceTransformer) -> int:
    """Index at which a filter goes: after Pooling, before Normalize.

    Raises:
        PlacementError: If the model has a filter already, no Pooling, or another module with
            weights of its own, after which embeddings are not in the space of W_U.
    """
    if filter_of(model) is not None:
        raise PlacementError(
            "a model holds one EmbedFilterLayer at most, got a model that has one; build the "
            "filter anew from the unfiltered model"
        )
    modules = list(model.children())
    pooling_width(model)
    trained = [m for m in modules[1:] if any(True for _ in m.state_dict())]
    if trained:
        raise PlacementError(
            f"a filter goes on the pooled hidden states of a language model, got {names(modules)}, "
            f"whose {type(trained[0]).__name__} moves them to another space; of a filtered model "
            "it is the filter (st_embfilter.load brings it back), another one must go first"
        )
    return next(i for i, module in enumerate(modules) if isinstance(module, Pooling)) + 1


def pooling_width(model: SentenceTransformer) -> int:
    """Width of the model's pooled embeddings.

    Raises:
        PlacementError: If it has no Pooling.
    """
    for module in model.children():
        if isinstance(module, Pooling):
            return int(module.pooling_output_dimension)
    raise PlacementError(
        "EmbedFilterLayer must stand after Pooling, got a model without Pooling: "
        + names(model.children())
    )


def insert_module(model: SentenceTransformer, position: int, module: Module) -> None:
    """Inserts a module into the pipeline; names of the others move on where they are numbers."""
    named = list(model.named_children())
    numbered = all(name.isdigit() for name, _ in named)
    renamed: dict[str, nn.Module] = {}
    kwargs_by_name = dict(getattr(model, "module_kwargs", None) or {})
    moved: dict[str, Any] = {}
    for i, (name, child) in enumerate([*named[:position], ("", module), *named[position:]]):
        new_name = str(i) if numbered else name or "embfilter"
        renamed[new_name] = child
        if name in kwargs_by_name:
            moved[new_name] = kwargs_by_name[name]
    check_placement(renamed.values())
    model._modules = OrderedDict(renamed)
    if kwargs_by_name:
        model.module_kwargs = moved


def replace_module(model: SentenceTransformer, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, on the model's device."""
    modules = {
        name: new.to(model.device) if module is old else module
        for name, module in model.named_children()
    }
    check_placement(modules.values())
    model._modules = OrderedDict(modules)


def names(modules: Iterable[nn.Module]) -> str:
    """The pipeline as errors show it, e.g. "Transformer > Pooling"."""
    return " > ".join(type(module).__name__ for module in modules)

"""Better and smaller zero-shot text embeddings from any decoder language model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from st_embfilter.build import (
        add_filter,
        build_filter,
        calibrate_filter,
        filter_from_weight,
        from_causal_lm,
        load,
        stack_filter,
    )
    from st_embfilter.errors import EmbedFilterError
    from st_embfilter.layer import EmbedFilterLayer
    from st_embfilter.prompts import Echo, MetaEOL, PromptEOL
    from st_embfilter.publish import push_to_hub, save_pretrained
    from st_embfilter.sampling import sample_texts
    from st_embfilter.spectrum import Band, Spectrum

__all__ = [
    "Band",
    "Echo",
    "EmbedFilterError",
    "EmbedFilterLayer",
    "MetaEOL",
    "PromptEOL",
    "Spectrum",
    "__version__",
    "add_filter",
    "build_filter",
    "calibrate_filter",
    "filter_from_weight",
    "from_causal_lm",
    "load",
    "push_to_hub",
    "sample_texts",
    "save_pretrained",
    "stack_filter",
]

# Names load with their first use: the command line's --help must not wait for torch.
_HOMES = {
    "Band": "spectrum",
    "Echo": "prompts",
    "EmbedFilterError": "errors",
    "EmbedFilterLayer": "layer",
    "MetaEOL": "prompts",
    "PromptEOL": "prompts",
    "Spectrum": "spectrum",
    "add_filter": "build",
    "build_filter": "build",
    "calibrate_filter": "build",
    "filter_from_weight": "build",
    "from_causal_lm": "build",
    "load": "build",
    "sample_texts": "sampling",
    "push_to_hub": "publish",
    "save_pretrained": "publish",
    "stack_filter": "build",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("st-embfilter")
    if name not in _HOMES:
        raise AttributeError(f"module 'st_embfilter' has no attribute {name!r}")
    value = getattr(import_module(f"st_embfilter.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

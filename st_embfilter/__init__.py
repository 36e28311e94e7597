"""Better and smaller zero-shot text embeddings from any decoder language model."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from st_embfilter.text import lazy_names

if TYPE_CHECKING:
    from st_embfilter.corpus.encode import encode_corpus
    from st_embfilter.corpus.stored import apply_filter, filter_vectors
    from st_embfilter.errors import EmbedFilterError
    from st_embfilter.model.attach import add_filter, stack_filter
    from st_embfilter.model.build import build_filter, filter_from_weight, from_causal_lm
    from st_embfilter.model.calibrate import calibrate_filter, generic_texts
    from st_embfilter.model.layer import EmbedFilterLayer
    from st_embfilter.model.prompts import Echo, MetaEOL, PromptEOL
    from st_embfilter.saved.folder import save_pretrained
    from st_embfilter.saved.load import load
    from st_embfilter.saved.onnx_out import export_onnx
    from st_embfilter.saved.push import push_to_hub
    from st_embfilter.spectrum.band import Band
    from st_embfilter.spectrum.spectrum import Spectrum

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
    "apply_filter",
    "build_filter",
    "calibrate_filter",
    "encode_corpus",
    "export_onnx",
    "filter_from_weight",
    "filter_vectors",
    "from_causal_lm",
    "generic_texts",
    "load",
    "push_to_hub",
    "sample_texts",
    "save_pretrained",
    "stack_filter",
]

# Names load with their first use: the command line's --help must not wait for torch.
_load = lazy_names(
    __name__,
    {
        "Band": "spectrum.band",
        "Echo": "model.prompts",
        "EmbedFilterError": "errors",
        "EmbedFilterLayer": "model.layer",
        "MetaEOL": "model.prompts",
        "PromptEOL": "model.prompts",
        "Spectrum": "spectrum.spectrum",
        "add_filter": "model.attach",
        "apply_filter": "corpus.stored",
        "build_filter": "model.build",
        "calibrate_filter": "model.calibrate",
        "encode_corpus": "corpus.encode",
        "export_onnx": "saved.onnx_out",
        "filter_from_weight": "model.build",
        "filter_vectors": "corpus.stored",
        "from_causal_lm": "model.build",
        "generic_texts": "model.calibrate",
        "load": "saved.load",
        "sample_texts": "model.sampling",
        "push_to_hub": "saved.push",
        "save_pretrained": "saved.folder",
        "stack_filter": "model.attach",
    },
)

#: Modules that documents imported from before they moved into rooms.
_MOVED = {
    "frequencies": "lens.counts",
    "report": "lens.report",
    "results": "saved.results",
    "tasks": "evaluation.tasks",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("st-embfilter")
    value = _load(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module by its old path, with a DeprecationWarning."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> Any:
        name = fullname.removeprefix(f"{__name__}.")
        return ModuleSpec(fullname, self) if name != fullname and name in _MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"{__name__}.{_MOVED[old.removeprefix(f'{__name__}.')]}"
        warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=2)
        found = import_module(new)
        module.__dict__.update({k: v for k, v in vars(found).items() if not k.startswith("__")})


sys.meta_path.append(_MovedModules())

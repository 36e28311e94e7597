"""Read what was saved: a filter, or a whole filtered model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Transformer
from torch import nn

from st_embfilter.errors import BackboneError, EmbedFilterError, FormatError
from st_embfilter.files.folder import ModelFiles, check_plain
from st_embfilter.model.backbone import measured
from st_embfilter.model.find import find_filter
from st_embfilter.model.layer import EmbedFilterLayer, filter_of, read_filter
from st_embfilter.model.modules_file import (
    MODULES_FILE,
    check_dense_config,
    filter_module,
    parse_modules,
)
from st_embfilter.model.pipeline import names, replace_module
from st_embfilter.model.static import set_static_metadata
from st_embfilter.model.whole import check_finite, loaded_whole
from st_embfilter.saved.layout import TRANSFORMER_CONFIG, check_length
from st_embfilter.text import first_line, is_failure, read_json
from st_embfilter.unembedding.source import Source

_HUB_ARGUMENTS: Final = ("token", "cache_folder", "revision", "local_files_only")


def load(
    path: str | os.PathLike[str] | Source,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> SentenceTransformer:
    """Loads a saved filtered model with a live `EmbedFilterLayer`.

    Args:
        path: Folder or Hub id of a portable folder, or of a model that `SentenceTransformer` saved;
            or a `Source`, which has a revision, a token and a trust of its own.
        trust_remote_code: Needed for the latter form, as for any module outside
            sentence-transformers.
        **kwargs: Passed on to `SentenceTransformer`.

    Raises:
        FormatError: If the folder holds no filter, or its files contradict each other.
        BackboneError: If sentence-transformers cannot load the rest.
    """
    if isinstance(path, Source):
        source = path
        kwargs = {**source.for_sentence_transformers(), **kwargs}
    else:
        where = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        source = Source(os.fspath(path), trust_remote_code=trust_remote_code, **where)
    found = find_filter(source)
    depth = None if found is None else found.metadata.depth
    static = found is not None and depth is not None and depth.layers == 0
    layer = None if static else read_saved(source.files, trust_remote_code=source.trust_remote_code)
    if source.is_folder:
        check_plain(Path(source.name))
    if source.files.commit is not None:  # should the branch move meanwhile
        kwargs["revision"] = source.files.commit
    try:
        with loaded_whole(source.files):
            model = SentenceTransformer(
                source.name, trust_remote_code=source.trust_remote_code, **kwargs
            )
    except EmbedFilterError:
        raise
    except BaseException as error:  # files of strangers fail in many ways, all mean the same
        if not is_failure(error):
            raise
        raise BackboneError(
            "a saved model must load with sentence-transformers, got "
            f"{source.name}: {first_line(error)}"
        ) from error
    check_finite(model, source.name)
    if layer is None:
        if found is not None:
            set_static_metadata(model, found.metadata)
        return model
    backbone = model[0]
    if isinstance(backbone, Transformer) and isinstance(backbone.auto_model, nn.Module):
        measured(backbone)  # not where another runtime has the backbone
    if filter_of(model) is not None:
        return model
    dense = next((module for module in model.children() if isinstance(module, Dense)), None)
    if dense is None:
        raise FormatError(
            "a filtered model must load with its Dense module, got "
            f"{names(model.children())} from {source.name}; its files were edited"
        )
    replace_module(model, dense, layer)
    return model


def read_saved(files: ModelFiles, *, trust_remote_code: bool = False) -> EmbedFilterLayer:
    """The filter of a saved model, whose small files are held against it; no backbone is loaded.

    Args:
        files: Of a model in the portable form, or in that of sentence-transformers.
        trust_remote_code: Whether `modules.json` may name classes of other packages.

    Raises:
        FormatError: If there is no filter, or its files contradict each other.
        PlacementError: If the filter stands in the wrong place.
    """
    modules_file = files.path(MODULES_FILE)
    if modules_file is None:
        raise FormatError(
            f"a filtered model must hold {MODULES_FILE}, got none in {files.where}; build one with "
            "from_causal_lm or `st-embfilter build`"
        )
    modules = parse_modules(modules_file.read_bytes())
    module = filter_module(modules, trust_remote_code=trust_remote_code)
    layer = read_filter(files, f"{module.path}/")
    config = files.path(f"{module.path}/config.json")
    if config is None:
        raise FormatError(f"a filtered model must hold {module.path}/config.json, got none")
    d, k = layer.in_features, layer.out_features
    check_dense_config(config.read_bytes(), d=d, k=k, bias=layer.bias)
    lengths = files.path(TRANSFORMER_CONFIG)
    if lengths is not None:
        check_length(read_json(lengths.read_bytes(), TRANSFORMER_CONFIG, FormatError))
    return layer


def load_filter(path: str | os.PathLike[str] | Source, **options: Any) -> EmbedFilterLayer:
    """Loads the filter of a saved model without its backbone, or a filter alone.

    Args:
        path: Folder or Hub id, in any form, or a `Source`.
        **options: Attributes of `Source`.

    Raises:
        FormatError: If there is no filter, or its files contradict each other.
    """
    return read_filter(Source.of(path, **options).files)

"""Put a filter into a model that is there already."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

from sentence_transformers import SentenceTransformer

from st_embfilter.errors import BandError, HubError, ProvenanceError, UnembeddingError
from st_embfilter.files.hub import is_repo_id
from st_embfilter.model.backbone import backbone_model, source_name
from st_embfilter.model.build import check_width, fit_filter
from st_embfilter.model.depth import cut_model
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.pipeline import filter_position, insert_module, pooling_width
from st_embfilter.spectrum.band import Band
from st_embfilter.unembedding.matrix import Unembedding, unembedding_of_tensor
from st_embfilter.unembedding.source import Source, UnembeddingSource, open_unembedding


def add_filter(
    model: SentenceTransformer,
    filter: EmbedFilterLayer | str | os.PathLike[str] | None = None,  # noqa: A002
    *,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    layers: float | int | None = None,
    unembedding: UnembeddingSource | None = None,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Inserts a filter into an existing model with a decoder backbone, after its pooling.

    Args:
        model: A model with modules Transformer and Pooling; changed in place.
        filter: A ready filter, or the folder or Hub id of a saved one, made from this model's W_U;
            None to build one.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, for the
            keep of a `Band`, or for that of a ready filter.
        band: The directions that are kept, see `Band`; a ready filter has its own.
        layers: The model's first blocks that are kept, at least one, or a ratio of them; None for
            all.
        unembedding: The place of W_U; None for the checkpoint of the model's backbone, or the live
            input embedding where that is gone and the two are tied.
        trust_remote_code: Whether model code of the checkpoint may run.
        show_progress_bar: Whether a bar is shown while the unembedding matrix is read.

    Returns:
        The same model.

    Raises:
        BandError: If the band does not fit, or a ready filter comes with a keep or a band.
        PlacementError: If the model has a filter already, or no place for one.
        ProvenanceError: If a ready filter was made from another unembedding matrix.
        ShapeError: If the widths do not fit.
    """
    if filter is not None and (keep, band) != (None, "bulk"):
        raise BandError(
            f"a ready filter has a band and a width of its own, got keep={keep!r} and band={band!r}"
            " beside it; leave them out, or leave out the filter"
        )
    chosen = Band.parse(band, keep)
    position = filter_position(model)
    ready = (
        EmbedFilterLayer.from_pretrained(filter)
        if isinstance(filter, str | os.PathLike)
        else filter
    )
    if ready is not None:
        check_width(ready, pooling_width(model))
    if unembedding is None:
        matrix = _own_unembedding(model, trust_remote_code)
    else:
        matrix = open_unembedding(unembedding, trust_remote_code=trust_remote_code)
    if ready is None:
        layer = fit_filter(matrix, chosen, show_progress_bar=show_progress_bar)
        check_width(layer, pooling_width(model))
    else:
        layer = ready
        _check_origin(layer, matrix)
    if layers is not None:
        depth = cut_model(backbone_model(model), layers, at_least=1)
        layer.metadata = replace(layer.metadata, depth=depth if depth.layers < depth.of else None)
    insert_module(model, position, layer.to(model.device))
    return model


def stack_filter(
    model: SentenceTransformer,
    layer: EmbedFilterLayer | str | os.PathLike[str],
    **options: Any,
) -> SentenceTransformer:
    """The former name of `add_filter(model, filter)`; goes with the next release.

    Args:
        model: A model with modules Transformer and Pooling; changed in place.
        layer: A ready filter, or the folder or Hub id of a saved one.
        **options: The other arguments of `add_filter`.
    """
    warnings.warn(
        "stack_filter(model, filter) is now add_filter(model, filter)",
        DeprecationWarning,
        stacklevel=2,
    )
    return add_filter(model, layer, **options)


def _check_origin(layer: EmbedFilterLayer, unembedding: Unembedding) -> None:
    """A filter fits only the matrix that it was made from; the matrix is read to be hashed."""
    made_from = layer.metadata.provenance
    found = unembedding.made_as(made_from)
    if found.sha256 != made_from.sha256:
        raise ProvenanceError(
            f"a filter must be made from the unembedding matrix of its model, got a filter from "
            f"{made_from.tensor!r} of {made_from.model_id} (sha256 {made_from.sha256}) for "
            f"{found.tensor!r} of {found.model_id} (sha256 {found.sha256}); build one for this "
            "model with add_filter"
        )


def _own_unembedding(model: SentenceTransformer, trust_remote_code: bool) -> Unembedding:
    """W_U of the checkpoint that the model's backbone was loaded from."""
    inner = backbone_model(model)
    config = getattr(inner, "config", None)
    name = source_name(model)
    unreachable: HubError | None = None
    if name is not None and (os.path.isdir(name) or is_repo_id(name)):
        commit = getattr(config, "_commit_hash", None)
        try:
            return Source(name, commit, trust_remote_code=trust_remote_code).unembedding()
        except HubError as error:
            unreachable = error
    embedding = getattr(inner, "get_input_embeddings", lambda: None)()
    if getattr(config, "tie_word_embeddings", False) and embedding is not None:
        return Unembedding(unembedding_of_tensor(embedding.weight).stored, True, name)
    raise UnembeddingError(
        "the model must have a checkpoint to read its unembedding matrix from, got a backbone "
        f"from {name!r} whose head is not in memory; pass unembedding="
    ) from unreachable

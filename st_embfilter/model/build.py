"""Build filters, and filtered models of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn

from st_embfilter.errors import (
    CalibrationError,
    DepthError,
    PlacementError,
    PromptError,
    ShapeError,
)
from st_embfilter.model.backbone import DEFAULT_MAX_SEQ_LENGTH, TEXT_ONLY, load_backbone, measured
from st_embfilter.model.calibrate import GENERIC_TEXTS, calibrate_filter, generic_texts
from st_embfilter.model.cut import load_cut
from st_embfilter.model.find import find_filter
from st_embfilter.model.gguf_backbone import readable
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.prompts import Encoding, Recipe, parse_prompt
from st_embfilter.model.sampling import sample_texts
from st_embfilter.model.static import check_static, fold, token_embeddings
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import Precision
from st_embfilter.spectrum.whitening import DEFAULT_STRENGTH, check_strength
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.source import Source, UnembeddingSource, open_unembedding

POOLING_MODES = Pooling.POOLING_MODES


def from_causal_lm(
    name_or_path: str | os.PathLike[str] | Source,
    *,
    prompt: str | Recipe | None = None,
    prompt_encoding: Encoding | None = None,
    pooling: str | None = None,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    layers: float | int | None = None,
    token_weights: str | None = None,
    normalize: bool = False,
    calibrate: str | Sequence[str] | None = None,
    calibration_strength: float = DEFAULT_STRENGTH,
    calibration_size: int = GENERIC_TEXTS,
    calibration_seed: int = 0,
    max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    masked_lm: bool = False,
    trust_remote_code: bool = False,
    norm: Literal["folded"] | None = None,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Turns a decoder language model into a filtered text embedder.

    Args:
        name_or_path: Folder or Hub id of a causal language model, or of a PEFT adapter of one,
            which is merged into it; or a GGUF file, which is dequantised.
        prompt: Prompt recipe: "prompteol", "pretended-cot", "knowledge", "echo", "metaeol", a
            template with one `{text}`, or a `PromptEOL`, `Echo` or `MetaEOL`; None embeds the plain
            text.
        prompt_encoding: "portable" or "exact", see `PromptEOL`; None for the recipe's own.
        pooling: "mean", "lasttoken" or another mode of `Pooling`; None for the recipe's own (mean
            for plain text).
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: The directions that are kept, see `Band`; "bulk" is the paper's.
        layers: How much of the model is used: the number of its first blocks, or a ratio of them in
            (0, 1], then the final norm. None for all; 0 for a table of token embeddings without a
            transformer, `StaticEmbedding`.
        token_weights: With layers=0, "zipf" or "sif" to weight tokens by their rank in the
            vocabulary; None for the plain mean.
        normalize: Whether embeddings are scaled to unit length after the filter.
        calibrate: Texts to centre and whiten with, see `calibrate_filter`; "generic" for those that
            come with the package, "self" for texts that the model writes itself; None for the
            paper's method, without. Texts of few subjects take the differences between those away,
            the more the higher the strength.
        calibration_strength: Strength of the whitening in [0, 1].
        calibration_size: Number of generic texts, or of those that the model writes.
        calibration_seed: Seed of the sampling of those texts.
        max_seq_length: Longest text in tokens, its prompt included; None for the model's own limit.
        device: Device on which the model runs, and on "cuda" the spectrum is computed; None for
            the best at hand.
        dtype: Dtype of the backbone, as in transformers; of a GGUF file, float16 by default (Gemma:
            bfloat16). The filter is float32 in any case; with layers=0 it is the dtype of the
            table, float32 if None; in float16 its entries are scaled by a power of two to at most
            1.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        masked_lm: Whether the model is a masked language model, whose decoder matrix is taken;
            outside the paper.
        trust_remote_code: Whether model code of the checkpoint may run.
        norm: "folded" for the spectrum of W_U diag(g), g the gain of the norm before it, instead
            of the paper's; what `st-embfilter export` bakes into a model.
        show_progress_bar: Whether bars are shown while weights are dequantised and W_U is read.

    Returns:
        Transformer, Pooling, EmbedFilterLayer and, if asked for, Normalize; with layers=0
        StaticEmbedding in place of the first three.

    Raises:
        EmbedFilterError: If the model is no decoder LM, or an argument is out of range.
    """
    source = Source.of(
        name_or_path,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        masked_lm=masked_lm,
        norm=norm,
    )
    recipe = parse_prompt(prompt, prompt_encoding)
    check_strength(calibration_strength)
    if isinstance(calibrate, str) and calibrate not in ("generic", "self"):
        raise CalibrationError(
            f"calibrate must be None, 'generic', 'self' or a sequence of texts, got {calibrate!r}"
        )
    texts = generic_texts(calibration_size) if calibrate == "generic" else calibrate
    if pooling is not None and pooling not in POOLING_MODES:
        raise PlacementError(f"pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
    static = layers == 0
    if static:
        check_static(recipe, pooling)
    elif token_weights is not None:
        raise DepthError(f"token_weights need layers=0, got layers={layers!r}; leave them out")
    chosen = Band.parse(band, keep)
    _check_plain(source)
    unembedding = source.unembedding()
    chosen.width(unembedding.d)  # a band that does not fit is an error before any download
    wanted = source.norm
    table_dtype = dtype
    source, dtype = readable(source, dtype, show_progress_bar=show_progress_bar)
    if source.norm != wanted:  # a copy would look for the matrix again
        source = replace(source, norm=wanted)
    unembedding = source.unembedding()  # of a GGUF file, in the dtype that is saved
    load_whole = partial(
        load_backbone,
        max_seq_length=max_seq_length,
        dtype=torch.float32 if static else dtype,
        module_class=Transformer if recipe is None else recipe.transformer,
        modality_config=TEXT_ONLY if recipe is None else recipe.modality_config,
    )
    backbone, depth = (
        (load_whole(source), None) if layers is None else load_cut(source, layers, load_whole)
    )
    table = token_embeddings(backbone, token_weights) if static else None
    width = measured(backbone).shape[0] if table is None else table.embedding.weight.shape[1]
    where = device if device is not None and device.startswith("cuda") else "cpu"
    layer = fit_filter(unembedding, chosen, device=where, show_progress_bar=show_progress_bar)
    check_width(layer, width)
    if depth is not None and depth.layers < depth.of:
        depth = replace(depth, token_weights=token_weights)
        layer.metadata = replace(layer.metadata, depth=depth)
    if table is not None:
        modules: list[nn.Module] = [table, layer]
    elif recipe is None:
        modules = [backbone, Pooling(width, pooling or "mean"), layer]
    else:
        recipe = recipe.for_model(backbone.config.model_type)
        modules = [backbone, recipe.apply(backbone, pooling), layer]
        layer.metadata = replace(layer.metadata, prompt=recipe.to_dict())
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device=device)
    if texts == "self":
        texts = sample_texts(
            source,
            calibration_size,
            seed=calibration_seed,
            device=model.device,
            dtype=dtype,
            show_progress_bar=show_progress_bar,
        )
    if texts is not None:
        calibrate_filter(
            model,
            texts,
            strength=calibration_strength,
            seed=calibration_seed if calibrate == "self" else None,
            show_progress_bar=show_progress_bar,
        )
    return fold(model, table_dtype) if static else model


def _check_plain(source: Source) -> None:
    """A model that was saved with a prompt puts every text into it, a second prompt as well."""
    found = find_filter(source)
    if found is not None and found.metadata.prompt is not None:
        raise PromptError(
            "a language model must read texts as they are, got a filtered model with a prompt in "
            f"{source.name}; load it with st_embfilter.load, or build from "
            f"{found.metadata.provenance.model_id or 'the model that it was made from'}"
        )


def build_filter(
    source: UnembeddingSource,
    *,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | bool | None = None,
    masked_lm: bool = False,
    trust_remote_code: bool = False,
    norm: Literal["folded"] | None = None,
    show_progress_bar: bool = True,
) -> EmbedFilterLayer:
    """The filter of a language model; reads its unembedding matrix and nothing else.

    Args:
        source: Folder or Hub id of a causal language model or a PEFT adapter; a GGUF file; a live
            transformers model with its head; or W_U itself, (V, d), any floating dtype, not
            centred, all rows.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: The directions that are kept, see `Band`.
        precision: Arithmetic of the Gram matrix, see `Unembedding.fit`.
        device: Device on which the Gram matrix is computed.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        masked_lm: Whether the model is a masked language model; outside the paper.
        trust_remote_code: Whether model code of the checkpoint may run.
        norm: "folded" for the spectrum of W_U diag(g), g the gain of the norm before it, instead
            of the paper's; what `st-embfilter export` bakes into a model.
        show_progress_bar: Whether a bar is shown while the unembedding matrix is read.

    Raises:
        BandError: If the band does not fit; nothing has been read then but the shape.
        UnembeddingError: If the model has no usable unembedding matrix.
    """
    chosen = Band.parse(band, keep)
    unembedding = open_unembedding(
        source,
        revision=revision,
        token=token,
        masked_lm=masked_lm,
        norm=norm,
        trust_remote_code=trust_remote_code,
    )
    return fit_filter(
        unembedding,
        chosen,
        precision=precision,
        device=device,
        show_progress_bar=show_progress_bar,
    )


def filter_from_weight(
    weight: Tensor, *, keep: float | int | None = None, band: str | Band = "bulk"
) -> EmbedFilterLayer:
    """The former name of `build_filter(weight)`; goes with the next release.

    Args:
        weight: W_U, (V, d), any floating dtype; not centred, all rows.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: The directions that are kept, see `Band`.
    """
    warnings.warn(
        "filter_from_weight(weight) is now build_filter(weight)", DeprecationWarning, stacklevel=2
    )
    return build_filter(weight, keep=keep, band=band, precision="float64", show_progress_bar=False)


def fit_filter(
    unembedding: Unembedding,
    band: Band,
    *,
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
    show_progress_bar: bool = True,
) -> EmbedFilterLayer:
    """The filter of a matrix that was found: its spectrum, and the directions that a band keeps.

    Args:
        unembedding: W_U, (V, d); read once, block by block, and hashed on the way.
        band: The directions that are kept.
        precision: Arithmetic of the Gram matrix, see `Unembedding.fit`.
        device: Device on which the Gram matrix is computed.
        show_progress_bar: Whether a bar is shown, where a person watches.

    Raises:
        BandError: If the band does not fit; nothing has been read then but the shape.
    """
    band.width(unembedding.d)
    with unembedding.progress_bar(show_progress_bar) as progress:
        spectrum, provenance = unembedding.fit(
            band, precision=precision, device=device, progress=progress
        )
    projection, gain = spectrum.projection(band), unembedding.gain
    if gain is None:
        return EmbedFilterLayer(
            projection, FilterMetadata(provenance, band), spectrum.singular_values
        )
    # The directions are those of h / g; one linear layer either way.
    metadata = FilterMetadata(provenance, band, norm="folded")
    return EmbedFilterLayer(projection / gain, metadata, spectrum.singular_values)


def check_width(layer: EmbedFilterLayer, width: int | None) -> None:
    """Checks that a filter takes embeddings of this width.

    Raises:
        ShapeError: Names both widths.
    """
    if layer.in_features != width:
        raise ShapeError(
            f"the unembedding matrix must be as wide as the pooled embedding, got {width} for the "
            f"embedding and {layer.in_features} for {layer.metadata.provenance.tensor!r}"
        )

"""Build filters and filtered models."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Module, Normalize, Pooling
from torch import Tensor, nn
from tqdm.auto import tqdm

from st_embfilter.errors import (
    CalibrationError,
    HubError,
    PlacementError,
    PromptError,
    ProvenanceError,
    ShapeError,
    UnembeddingError,
)
from st_embfilter.files.hub import is_repo_id
from st_embfilter.model.backbone import (
    DEFAULT_MAX_SEQ_LENGTH,
    backbone_model,
    load_backbone,
    measured_width,
    source_name,
)
from st_embfilter.model.find import find_filter
from st_embfilter.model.layer import EmbedFilterLayer, check_placement, filter_of
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.prompts import Encoding, Recipe, parse_prompt
from st_embfilter.model.sampling import sample_texts
from st_embfilter.model.tokenizer import apply_recipe, modality_config, transformer_class
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import Precision
from st_embfilter.spectrum.whitening import (
    DEFAULT_STRENGTH,
    Calibration,
    affine_map,
    check_strength,
    different_texts,
    moments,
    texts_hash,
)
from st_embfilter.unembedding.matrix import Progress, Unembedding, unembedding_of_tensor
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
    normalize: bool = False,
    calibrate: str | Sequence[str] | None = None,
    calibration_strength: float = DEFAULT_STRENGTH,
    calibration_size: int = 1024,
    calibration_seed: int = 0,
    max_seq_length: int | None = DEFAULT_MAX_SEQ_LENGTH,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    masked_lm: bool = False,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Turns a decoder language model into a filtered text embedder.

    Args:
        name_or_path: Folder or Hub id of a causal language model, or of a PEFT adapter of one,
            which is merged into it.
        prompt: Prompt recipe: "prompteol", "echo", "metaeol", a template with one `{text}`, or a
            `PromptEOL`, `Echo` or `MetaEOL`; None embeds the plain text.
        prompt_encoding: "portable" or "exact", see `PromptEOL`; None for the recipe's own.
        pooling: "mean", "lasttoken" or another mode of `Pooling`; None for the recipe's own (mean
            for plain text).
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: Which ones, see `Band`; "bulk" is the paper's.
        normalize: Scale embeddings to unit length after the filter.
        calibrate: None for the paper's method; "self" to centre and whiten with texts that the
            model writes itself, or a sequence of texts to do it with; see `calibrate_filter`.
        calibration_strength: In [0, 1].
        calibration_size: Number of texts that the model writes.
        calibration_seed: Of their sampling.
        max_seq_length: Longest text in tokens, its prompt included; None for the model's own limit.
        device: Where the model runs, and on "cuda" the spectrum too; None for the best at hand.
        dtype: Of the backbone, as in transformers. The filter is float32 in any case.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        masked_lm: Take a masked language model and its decoder matrix; outside the paper.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar while the unembedding matrix is read.

    Returns:
        Transformer, Pooling, EmbedFilterLayer and, if asked for, Normalize.

    Raises:
        EmbedFilterError: If the model is no decoder LM, or an argument is out of range.
    """
    source = Source.of(
        name_or_path,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        masked_lm=masked_lm,
    )
    recipe = parse_prompt(prompt, prompt_encoding)
    check_strength(calibration_strength)
    if isinstance(calibrate, str) and calibrate != "self":
        raise CalibrationError(
            f"calibrate must be None, 'self' or a sequence of texts, got {calibrate!r}"
        )
    if pooling is not None and pooling not in POOLING_MODES:
        raise PlacementError(f"pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
    chosen = Band.parse(band, keep)
    _check_plain(source)
    unembedding = source.unembedding()
    chosen.width(unembedding.d)  # a band that does not fit is an error before any download
    backbone = load_backbone(
        source,
        max_seq_length=max_seq_length,
        dtype=dtype,
        module_class=transformer_class(recipe),
        modality_config=modality_config(recipe),
    )
    where = device if device is not None and device.startswith("cuda") else "cpu"
    layer = _fit_filter(unembedding, chosen, None, where, show_progress_bar)
    width = backbone.get_embedding_dimension()
    if width != layer.in_features:  # the config may name the width of the layers, not the output's
        width = measured_width(backbone)
    _check_width(layer, width)
    if recipe is None:
        pool = Pooling(width, pooling or "mean")
    else:
        recipe = recipe.for_model(backbone.config.model_type)
        pool = apply_recipe(backbone, recipe, pooling)
        layer.metadata = replace(layer.metadata, prompt=recipe.to_dict())
    modules: list[nn.Module] = [backbone, pool, layer]
    if normalize:
        modules.append(Normalize())
    model = SentenceTransformer(modules=modules, device=device)
    if calibrate is None:
        return model
    if calibrate == "self":
        texts = sample_texts(
            source,
            calibration_size,
            seed=calibration_seed,
            device=model.device,
            dtype=dtype,
            show_progress_bar=show_progress_bar,
        )
    else:
        texts = list(calibrate)
    return calibrate_filter(
        model,
        texts,
        strength=calibration_strength,
        seed=calibration_seed if calibrate == "self" else None,
        show_progress_bar=show_progress_bar,
    )


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
    name_or_path: str | os.PathLike[str] | Source,
    *,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | bool | None = None,
    masked_lm: bool = False,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> EmbedFilterLayer:
    """The filter of a language model; reads its unembedding matrix and nothing else.

    Args:
        name_or_path: Folder or Hub id of a causal language model or a PEFT adapter; or a GGUF file.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: Which ones, see `Band`.
        precision: Arithmetic of the Gram matrix, see `Unembedding.fit`.
        device: Where the Gram matrix is computed.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        masked_lm: Take the decoder matrix of a masked language model; outside the paper.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar while the unembedding matrix is read.

    Raises:
        BandError: If the band does not fit; nothing has been read then but the shape.
        UnembeddingError: If the model has no usable unembedding matrix.
    """
    chosen = Band.parse(band, keep)
    unembedding = open_unembedding(
        name_or_path,
        revision=revision,
        token=token,
        masked_lm=masked_lm,
        trust_remote_code=trust_remote_code,
    )
    return _fit_filter(unembedding, chosen, precision, device, show_progress_bar)


def filter_from_weight(
    weight: Tensor, *, keep: float | int | None = None, band: str | Band = "bulk"
) -> EmbedFilterLayer:
    """The filter of an unembedding matrix in memory, in float64 arithmetic.

    Args:
        weight: W_U, (V, d), any floating dtype; not centred, all rows.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: Which ones, see `Band`.
    """
    return _fit_filter(
        unembedding_of_tensor(weight), Band.parse(band, keep), "float64", "cpu", False
    )


def add_filter(
    model: SentenceTransformer,
    *,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    unembedding: UnembeddingSource | None = None,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Inserts a filter into an existing model with a decoder backbone, after its pooling.

    Args:
        model: Changed in place.
        keep: Ratio of directions kept in (0, 1], or their number as an int; None for 0.5, or for
            the keep of a `Band`.
        band: Which ones, see `Band`.
        unembedding: Where W_U comes from; None for the checkpoint of the model's backbone, or the
            live input embedding where that is gone and the two are tied.
        trust_remote_code: Allow model code of the checkpoint to run.
        show_progress_bar: Show a bar while the unembedding matrix is read.

    Returns:
        The same model.

    Raises:
        PlacementError: If the model has a filter already, or no place for one.
        ShapeError: If the widths do not fit.
    """
    chosen = Band.parse(band, keep)
    position = _position(model)
    if unembedding is None:
        source = _own_unembedding(model, trust_remote_code)
    else:
        source = open_unembedding(unembedding, trust_remote_code=trust_remote_code)
    layer = _fit_filter(source, chosen, None, "cpu", show_progress_bar)
    _check_width(layer, backbone_width(model))
    insert_module(model, position, layer.to(model.device))
    return model


def calibrate_filter(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    strength: float = DEFAULT_STRENGTH,
    seed: int | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> SentenceTransformer:
    """Centres and whitens a model's filtered embeddings with the moments of some texts.

    The texts are encoded as the model encodes, without its default prompt and before Normalize. The
    map is folded into the filter, which stays one linear layer, now with a bias.

    Args:
        model: A filtered model; changed in place.
        texts: Texts like those to embed, or `sample_texts` of the model's own. Empty and repeated
            ones are dropped.
        strength: In [0, 1]; 0 leaves the embeddings as they are, 1 whitens in full.
        seed: Of `sample_texts`, if the texts come from there, for the record.
        batch_size: Of the encoding.
        show_progress_bar: Show a bar while the texts are encoded.

    Returns:
        The same model.

    Raises:
        CalibrationError: If the texts are too few or their embeddings unfit, or the model is
            calibrated already.
    """
    strength = check_strength(strength)
    texts = different_texts(texts)
    layer = filter_of(model)
    if layer is None:
        raise PlacementError("calibration needs a filtered model, got none; use add_filter first")
    if layer.metadata.calibration is not None:
        raise CalibrationError(
            "a filter is calibrated at most once, got a calibrated one; build the filter anew"
        )
    children = list(model.children())
    position = children.index(layer)
    pipeline = SentenceTransformer(modules=children[: position + 1], device=str(model.device))
    embeddings = pipeline.encode(
        texts,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar and sys.stderr.isatty(),
        convert_to_tensor=True,
    )
    estimate = moments(embeddings)
    matrix, bias = affine_map(estimate, strength)
    record = Calibration(
        source="texts" if seed is None else "self",
        texts=len(texts),
        sha256=texts_hash(texts),
        strength=strength,
        shrinkage=estimate.shrinkage,
        seed=seed,
    )
    children[position] = EmbedFilterLayer(
        matrix @ layer.projection.detach().to("cpu", torch.float64),
        replace(layer.metadata, calibration=record),
        layer.singular_values,
        bias,
    ).to(model.device)
    _set_modules(model, dict(zip(dict(model.named_children()), children, strict=True)))
    return model


def stack_filter(
    model: SentenceTransformer,
    layer: EmbedFilterLayer | str | os.PathLike[str],
    *,
    unembedding: UnembeddingSource | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Inserts a ready filter into a model with the unembedding matrix that it was made from.

    Args:
        model: Changed in place.
        layer: The filter, or where to load it from (see `EmbedFilterLayer.from_pretrained`).
        unembedding: Where the model's W_U comes from, see `add_filter`; it is read to be hashed.
        trust_remote_code: Allow model code of the checkpoint to run.

    Returns:
        The same model.

    Raises:
        ProvenanceError: If the filter was made from another unembedding matrix.
        PlacementError: If the model has a filter already, or no place for one.
        ShapeError: If the widths do not fit.
    """
    if not isinstance(layer, EmbedFilterLayer):
        layer = EmbedFilterLayer.from_pretrained(layer)
    position = _position(model)
    _check_width(layer, backbone_width(model))
    if unembedding is None:
        source = _own_unembedding(model, trust_remote_code)
    else:
        source = open_unembedding(unembedding, trust_remote_code=trust_remote_code)
    made_from = layer.metadata.provenance
    found = source.provenance(getattr(torch, made_from.dtype, None))
    if found.sha256 != made_from.sha256:
        raise ProvenanceError(
            f"a filter must be made from the unembedding matrix of its model, got a filter from "
            f"{made_from.tensor!r} of {made_from.model_id} (sha256 {made_from.sha256}) for "
            f"{found.tensor!r} of {found.model_id} (sha256 {found.sha256}); build one for this "
            "model with add_filter"
        )
    insert_module(model, position, layer.to(model.device))
    return model


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
    _set_modules(model, renamed)
    if kwargs_by_name:
        model.module_kwargs = moved


def backbone_width(model: SentenceTransformer) -> int:
    """Width of the model's pooled embeddings."""
    for module in model.children():
        if isinstance(module, Pooling):
            return int(module.pooling_output_dimension)
    raise PlacementError(
        "EmbedFilterLayer must stand after Pooling, got a model without Pooling: "
        + " > ".join(type(module).__name__ for module in model.children())
    )


def _fit_filter(
    unembedding: Unembedding,
    band: Band,
    precision: Precision | None,
    device: torch.device | str,
    show_progress_bar: bool,
) -> EmbedFilterLayer:
    band.width(unembedding.d)  # a band that does not fit is an error before anything is read
    with _progress(unembedding, show_progress_bar) as progress:
        spectrum, provenance = unembedding.fit(
            band, precision=precision, device=device, progress=progress
        )
    return EmbedFilterLayer(
        spectrum.projection(band), FilterMetadata(provenance, band), spectrum.singular_values
    )


@contextmanager
def _progress(unembedding: Unembedding, show: bool) -> Iterator[Progress]:
    with tqdm(
        total=unembedding.stored.nbytes,
        unit="B",
        unit_scale=True,
        desc=f"Spectrum of {unembedding.stored.name}",
        disable=None if show else True,  # None: only where a person watches
    ) as bar:

        def update(done: int, total: int) -> None:
            bar.update(done - bar.n if done > bar.n else 0)

        yield update


def _own_unembedding(model: SentenceTransformer, trust_remote_code: bool) -> Unembedding:
    inner = backbone_model(model)
    config = getattr(inner, "config", None)
    name = source_name(model)
    unreachable: HubError | None = None
    if name is not None and (os.path.isdir(name) or is_repo_id(name)):
        commit = getattr(config, "_commit_hash", None)
        try:
            return open_unembedding(name, revision=commit, trust_remote_code=trust_remote_code)
        except HubError as error:
            unreachable = error
    embedding = getattr(inner, "get_input_embeddings", lambda: None)()
    if getattr(config, "tie_word_embeddings", False) and embedding is not None:
        return Unembedding(unembedding_of_tensor(embedding.weight).stored, True, name)
    raise UnembeddingError(
        "the model must have a checkpoint to read its unembedding matrix from, got a backbone "
        f"from {name!r} whose head is not in memory; pass unembedding="
    ) from unreachable


def _position(model: SentenceTransformer) -> int:
    if filter_of(model) is not None:
        raise PlacementError(
            "a model holds one EmbedFilterLayer at most, got a model that has one; build the "
            "filter anew from the unfiltered model"
        )
    modules = list(model.children())
    backbone_width(model)
    return next(i for i, module in enumerate(modules) if isinstance(module, Pooling)) + 1


def _check_width(layer: EmbedFilterLayer, width: int | None) -> None:
    if layer.in_features != width:
        raise ShapeError(
            f"the unembedding matrix must be as wide as the pooled embedding, got {width} for the "
            f"embedding and {layer.in_features} for {layer.metadata.provenance.tensor!r}"
        )


def _set_modules(model: SentenceTransformer, modules: dict[str, nn.Module]) -> None:
    model._modules = OrderedDict(modules)

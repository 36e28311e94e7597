"""Calibration: texts that a language model wrote, and filters fitted to texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from sentence_transformers import SentenceTransformer

from st_embfilter.errors import CalibrationError, PlacementError
from st_embfilter.model.layer import EmbedFilterLayer, filter_of
from st_embfilter.model.pipeline import replace_module
from st_embfilter.spectrum.whitening import (
    DEFAULT_STRENGTH,
    MIN_TEXTS,
    Calibration,
    affine_map,
    check_strength,
    different_texts,
    moments,
    texts_hash,
)
from st_embfilter.text import read_json

#: What `generic_texts` reads; made by `benchmarks/generic_texts.py`.
GENERIC_FILE: Final = Path(__file__).with_name("generic_texts.json")

#: How many texts it holds.
GENERIC_TEXTS: Final = 1024


def generic_texts(count: int = GENERIC_TEXTS) -> list[str]:
    """The first of the short texts that come with the package, for any language model.

    SmolLM2-135M-Instruct (Apache-2.0) wrote them, facts, questions, problems, requests, opinions,
    titles and advice of everyday subjects, in English; the file says by which seed and settings.

    Args:
        count: How many, in [16, 1024]; the first ones are mixed as well.

    Raises:
        CalibrationError: If there are not so many.
    """
    if type(count) is not int or not MIN_TEXTS <= count <= GENERIC_TEXTS:
        raise CalibrationError(
            f"the number of generic texts must be in [{MIN_TEXTS}, {GENERIC_TEXTS}], got "
            f"{count!r}; give texts of your own to calibrate on more"
        )
    content = read_json(GENERIC_FILE.read_bytes(), GENERIC_FILE.name, CalibrationError)
    texts: list[str] = content["texts"][:count]
    return texts


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
        texts: Texts like those to embed, `generic_texts`, or `sample_texts` of the model's own.
            Empty and repeated ones are dropped.
        strength: A number in [0, 1]; 0 leaves the embeddings as they are, 1 whitens in full.
        seed: The seed of `sample_texts`, if the texts come from there, for the record.
        batch_size: Texts that are encoded at a time.
        show_progress_bar: Whether a bar is shown while the texts are encoded.

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
    pipeline = SentenceTransformer(
        modules=children[: children.index(layer) + 1], device=str(model.device)
    )
    embeddings = pipeline.encode(
        texts,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar and sys.stderr.isatty(),
        convert_to_tensor=True,
    )
    estimate = moments(embeddings)
    matrix, bias = affine_map(estimate, strength)
    digest = texts_hash(texts)
    generic = len(texts) <= GENERIC_TEXTS and digest == texts_hash(generic_texts(len(texts)))
    record = Calibration(
        source="generic" if generic else "texts" if seed is None else "self",
        texts=len(texts),
        sha256=digest,
        strength=strength,
        shrinkage=estimate.shrinkage,
        seed=seed,
    )
    calibrated = EmbedFilterLayer(
        matrix @ layer.projection.detach().to("cpu", torch.float64),
        replace(layer.metadata, calibration=record),
        layer.singular_values,
        bias,
    )
    replace_module(model, layer, calibrated)
    return model

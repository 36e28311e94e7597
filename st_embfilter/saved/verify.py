"""Checks of a saved filtered model: what its files promise, held against one another and W_U."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_embfilter.errors import CalibrationError, EmbedFilterError, FormatError
from st_embfilter.files.hub import model_files
from st_embfilter.model.build import (
    calibrate_filter,
    check_saved,
    load,
    load_filter,
)
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.modules_file import MODULES_FILE
from st_embfilter.model.sampling import sample_texts
from st_embfilter.saved.card import CARD_FILE, check_card, stated_base
from st_embfilter.spectrum.gram import Spectrum
from st_embfilter.spectrum.whitening import MAX_CONDITION, texts_hash
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.source import Source

#: Largest entry of P P^T - I that float32 rounding may leave.
ORTHONORMAL: Final = 1e-4

#: Largest relative error of a singular value, and largest sine between two subspaces.
TOLERANCE: Final = 1e-4

#: Largest relative error of a calibration that was repeated: encoding rounds.
CALIBRATION_TOLERANCE: Final = 1e-2


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: What was checked.
        passed: None if it could not be done here.
        detail: What was found, or why it was not.
    """

    name: str
    passed: bool | None
    detail: str


def verify(
    path: str | os.PathLike[str],
    *,
    rebuild: bool = False,
    trust_remote_code: bool = False,
    show_progress_bar: bool = True,
) -> list[Check]:
    """Checks a saved filtered model, or a filter alone.

    Nothing of the model runs, unless a calibrated filter is rebuilt. The unembedding matrix is read
    from the model itself, or from its base model where the model holds none.

    Args:
        path: Folder or Hub id.
        rebuild: Also compute the filter anew and compare subspaces, at every prefix of half the
            width before it. A calibration with texts of the model's own is repeated.
        trust_remote_code: Allow model code of the checkpoint to run; also accepts modules of other
            packages.
        show_progress_bar: Show a bar while texts are sampled.

    Returns:
        The checks in the order in which they were made. A failed one may end the list.
    """
    return list(_checks(os.fspath(path), rebuild, trust_remote_code, show_progress_bar))


def _checks(name: str, rebuild: bool, trust_remote_code: bool, bar: bool) -> Iterator[Check]:
    try:
        files = model_files(name)
        alone = files.path(MODULES_FILE) is None
        if alone:
            layer = load_filter(name)
        else:
            layer = check_saved(name, trust_remote_code=trust_remote_code)
    except EmbedFilterError as error:
        yield Check("files", False, str(error))
        return
    metadata = layer.metadata
    form = "a filter alone" if alone else "modules, configuration, metadata and weights agree"
    yield Check("files", True, form)
    yield Check("window", True, f"{metadata.band} band, {metadata.k} of {metadata.d}")
    yield _rows(layer)
    card = files.path(CARD_FILE)
    if not alone:
        text = None if card is None else card.read_text(encoding="utf-8", errors="replace")
        yield _attempt("card", lambda: _card(text, layer))
    try:
        unembedding = _unembedding(name, alone, layer, trust_remote_code)
    except EmbedFilterError as error:
        yield Check("unembedding", False if rebuild else None, str(error))
        return
    yield _attempt("unembedding", lambda: _hash(unembedding, layer))
    yield _attempt("directions", lambda: _directions(unembedding, layer))
    if rebuild:
        spectrum, _ = unembedding.fit(metadata.band)
        yield _attempt("rebuild", lambda: _subspaces(spectrum, layer))
        if metadata.calibration is not None:
            yield _attempt(
                "calibration",
                lambda: _calibration(name, alone, spectrum, layer, trust_remote_code, bar),
            )


def _attempt(name: str, action: Callable[[], tuple[bool | None, str]]) -> Check:
    try:
        return Check(name, *action())
    except EmbedFilterError as error:
        return Check(name, False, str(error))


def _rows(layer: EmbedFilterLayer) -> Check:
    rows = layer.projection.detach().to("cpu", torch.float64)
    record = layer.metadata.calibration
    if record is not None:
        # The map that is folded in has a bounded condition number, see `affine_map`.
        values = torch.linalg.svdvals(rows)
        limit = MAX_CONDITION ** (record.strength / 2)
        condition = float(values[0] / values[-1].clamp(min=1e-300))
        text = f"condition number {condition:.3g}, at most {limit:.3g} for its strength"
        return Check("rows", condition <= limit * 1.01, f"calibrated: {text}")
    error = float((rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype)).abs().max())
    return Check("rows", error <= ORTHONORMAL, f"orthonormal to {error:.1e}")


def _card(text: str | None, layer: EmbedFilterLayer) -> tuple[bool, str]:
    if text is None:
        raise FormatError(f"a saved model must hold {CARD_FILE}, got none")
    check_card(text)
    base = stated_base(text)
    if base is not None and base != layer.metadata.provenance.model_id:
        return False, f"names the base model {base}, embfilter.json says " + str(
            layer.metadata.provenance.model_id
        )
    return True, "valid metadata" + ("" if base is None else f", base model {base}")


def _unembedding(
    name: str, alone: bool, layer: EmbedFilterLayer, trust_remote_code: bool
) -> Unembedding:
    source = layer.metadata.provenance
    if not alone:
        try:
            return Source(name, trust_remote_code=trust_remote_code).unembedding()
        except EmbedFilterError:
            if source.model_id is None or source.revision is None:
                raise
    if source.model_id is None or source.revision is None:
        raise FormatError(
            "the unembedding matrix must be in the model or on the Hub, got a filter of "
            f"{source.model_id or 'an unnamed model'} without a commit; verify it where that is"
        )
    return Source(
        source.model_id, source.revision, trust_remote_code=trust_remote_code
    ).unembedding()


def _hash(unembedding: Unembedding, layer: EmbedFilterLayer) -> tuple[bool, str]:
    made_from = layer.metadata.provenance
    found = unembedding.provenance(getattr(torch, made_from.dtype, None))
    if found.shape != made_from.shape:
        return False, f"shape {found.shape}, embfilter.json says {made_from.shape}"
    if found.sha256 != made_from.sha256:
        return False, f"sha256 {found.sha256}, embfilter.json says {made_from.sha256}"
    return True, f"sha256 {found.sha256[:16]}... of {found.tensor}"


def _directions(unembedding: Unembedding, layer: EmbedFilterLayer) -> tuple[bool | None, str]:
    """|W v_i| is the singular value of the direction that row i must be: order and window."""
    if layer.metadata.calibration is not None:
        return None, "a calibrated filter mixes them; compare with --rebuild"
    values = layer.singular_values
    if values is None:
        return None, "no spectrum is stored; compare with --rebuild"
    rows = layer.projection.detach().to("cpu", torch.float32)
    squares = torch.zeros(rows.shape[0], dtype=torch.float64)
    for block in unembedding.blocks():
        squares += (block.to(torch.float32) @ rows.T).to(torch.float64).square().sum(dim=0)
    expected = values.cpu()[layer.metadata.band.indices(layer.metadata.d)]
    # Values far below the largest are lost in float32 rounding of the products.
    error = float(((squares.sqrt() - expected).abs() / (expected + 1e-3 * values[0].cpu())).max())
    return error <= 1e-3, f"singular values in nested order, to {error:.1e}"


def _subspaces(spectrum: Spectrum, layer: EmbedFilterLayer) -> tuple[bool, str]:
    expected = spectrum.projection(layer.metadata.band).to(torch.float64)
    rows = layer.projection.detach().to("cpu", torch.float64)
    k = rows.shape[0]
    calibrated = layer.metadata.calibration is not None
    # Calibration mixes the directions, but never leaves the space of all of them.
    widths = [k] if calibrated else [k >> i for i in range(k.bit_length())]
    worst = max(_sine(rows[:width], expected[:width]) for width in widths)
    names = ", ".join(map(str, widths))
    return worst <= TOLERANCE, f"sine of the largest angle {worst:.1e} at width {names}"


def _sine(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between two row spaces of the same dimension."""
    first, second = (torch.linalg.qr(matrix.T)[0] for matrix in (a, b))
    return float(torch.linalg.matrix_norm(second - first @ (first.T @ second), ord=2))


def _calibration(
    name: str,
    alone: bool,
    spectrum: Spectrum,
    layer: EmbedFilterLayer,
    trust_remote_code: bool,
    bar: bool,
) -> tuple[bool | None, str]:
    record = layer.metadata.calibration
    if record is None or record.source != "self" or alone:
        return None, "made with given texts, which the model does not hold"
    source = layer.metadata.provenance
    try:
        texts = sample_texts(
            name,
            record.texts,
            seed=record.seed or 0,
            trust_remote_code=trust_remote_code,
            show_progress_bar=bar,
        )
    except (CalibrationError, OSError, ValueError) as error:
        return None, f"cannot sample from {source.model_id}: {str(error).splitlines()[0]:.200}"
    if texts_hash(texts) != record.sha256:
        return None, "sampling gives other texts with these library versions or on this machine"
    model = load(name, trust_remote_code=trust_remote_code, device="cpu")
    bare = EmbedFilterLayer(
        spectrum.projection(layer.metadata.band), replace(layer.metadata, calibration=None)
    )
    modules = [bare if isinstance(m, EmbedFilterLayer) else m for m in model.children()]
    again = calibrate_filter(
        SentenceTransformer(modules=modules, device="cpu"),
        texts,
        strength=record.strength,
        seed=record.seed,
        show_progress_bar=bar,
    )
    made = next(m for m in again.children() if isinstance(m, EmbedFilterLayer))
    difference = max(
        float((value - layer.weights()[key]).norm() / layer.weights()[key].norm())
        for key, value in made.weights().items()
    )
    return difference <= CALIBRATION_TOLERANCE, f"repeated, to {difference:.1e}"

"""What `verify` compares: pure functions on matrices, on the content of small files, on folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from st_embfilter.errors import EmbedFilterError, FormatError, ShapeError
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.whole import is_finite
from st_embfilter.spectrum.gram import NEARLY, Precision, signs
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.spectrum.whitening import MAX_CONDITION
from st_embfilter.text import first_line, reading, shown
from st_embfilter.unembedding.matrix import Unembedding
from st_embfilter.unembedding.source import Source

#: float32 rounds every entry of a row by half of this, relative.
FLOAT32: Final = 2.0**-23

#: A turn of directions beyond which first-order perturbation says nothing.
_FIRST_ORDER: Final = 0.1


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: What was checked.
        passed: None if it could not be done here.
        detail: What was found; of what is unproven, why, and what would prove it.
    """

    name: str
    passed: bool | None
    detail: str

    @property
    def word(self) -> str:
        """One of ok, FAILED and unproven."""
        return {True: "ok", False: "FAILED", None: "unproven"}[self.passed]


def attempt(name: str, action: Callable[[], tuple[bool | None, str]]) -> Check:
    """The check that an action makes; whatever a stranger's file makes it raise is a failure."""
    try:
        with reading(f"what the check {name!r} compares", must="be comparable"):
            return Check(name, *action())
    except EmbedFilterError as error:
        return Check(name, False, str(error))


def measured_spectrum(
    unembedding: Unembedding, metadata: FilterMetadata, precision: Precision = "float32"
) -> tuple[Spectrum | None, Check]:
    """The spectrum of a matrix, and whether it is the one that a filter was made from.

    What float32 may leave in the model is allowed for, so it is enough here too.
    """
    made_from = metadata.provenance
    try:
        spectrum, found = unembedding.fit(metadata.band, precision=precision)
        found = unembedding.made_as(made_from, found)
    except EmbedFilterError as error:
        return None, Check("unembedding", False, str(error))
    if found.shape != made_from.shape:
        told = f"shape {found.shape}, embfilter.json says {made_from.shape}"
        return None, Check("unembedding", False, told)
    same = found.sha256 == made_from.sha256
    told = f"sha256 {found.sha256[:16]}... of {shown(found.tensor)}"
    more = "" if same else f", embfilter.json says {made_from.sha256}"
    return spectrum, Check("unembedding", same, told + more)


def turn_bounds(spectrum: Spectrum, indices: Tensor) -> Tensor:
    """How far directions of two computations of one spectrum may turn towards one another.

    First-order perturbation of eigenvectors: an error E of the Gram matrix turns direction i
    towards direction j by |v_i^T E v_j| / |s_i^2 - s_j^2|, and |v_i^T E v_j| is at most the smaller
    of |E v_i| and |E v_j|. E is what float32 sums may leave, in both computations and whatever the
    processor, and d eps |W|^2 of float64 sums and of LAPACK.

    Args:
        spectrum: Of W_U, d values.
        indices: (k,) directions that are compared.

    Returns:
        (k, d) float64 bounds of the sine; 1.0, which bounds nothing, for values so near to each
        other that no computation tells their directions apart.
    """
    squares = spectrum.singular_values.square()
    errors = 2 * spectrum.float32_errors() + spectrum.d * 2.0**-52 * squares[0]
    bounds = torch.minimum(errors[indices][:, None], errors[None, :])
    bounds /= (squares[indices][:, None] - squares[None, :]).abs()
    bounds = torch.where(bounds > _FIRST_ORDER, 1.0, bounds)
    bounds[torch.arange(len(indices)), indices] = 0.0
    return bounds


def unfolded(layer: EmbedFilterLayer, gain: Tensor) -> EmbedFilterLayer:
    """A filter of a folded norm as one of the normed state before its gain.

    Args:
        layer: The filter.
        gain: g, (d,), by which its rows are divided.

    Raises:
        ShapeError: If the widths differ.
    """
    if tuple(gain.shape) != (layer.in_features,):
        raise ShapeError(
            f"the norm of the model must have {layer.in_features} gains, got {tuple(gain.shape)}"
        )
    rows = layer.projection.detach().to("cpu", torch.float64) * gain
    return EmbedFilterLayer(rows, layer.metadata, layer.singular_values, layer.linear.bias)


def check_rows(layer: EmbedFilterLayer) -> tuple[bool, str]:
    """Orthonormal rows; of a calibrated filter, the condition number that its strength allows."""
    rows = layer.projection.detach().to("cpu", torch.float64)
    record = layer.metadata.calibration
    if record is not None:
        # The map that is folded in has a bounded condition number, see `affine_map`.
        values = torch.linalg.svdvals(rows)
        limit = _condition(layer)
        condition = float(values[0] / values[-1].clamp(min=1e-300))
        return condition <= limit * (1 + rows.shape[0] * FLOAT32 * limit), (
            f"calibrated: condition number {condition:.3g}, at most {limit:.3g} for its strength"
        )
    error = float((rows @ rows.T - torch.eye(rows.shape[0], dtype=rows.dtype)).abs().max())
    # What an orthogonalisation in float32 leaves.
    return error <= layer.in_features * FLOAT32, f"orthonormal to {error:.1e}"


def check_directions(spectrum: Spectrum, layer: EmbedFilterLayer) -> tuple[bool, str]:
    """Whether row i is the singular direction that the window has at place i, sign included.

    For a row v with singular value s, |W^T W v - s^2 v| is the length of its parts along the other
    directions, each times the difference of squares; here every part is held against the bound of
    `turn_bounds`. The sign is held against its rule, as which entry of a row is the largest can
    hang on the last bits. A calibrated filter is a symmetric positive map of the directions, which
    are its polar factor.
    """
    indices = torch.as_tensor(layer.metadata.band.indices(spectrum.d))
    rows = layer.projection.detach().to("cpu", torch.float64)
    rounding = FLOAT32 * _condition(layer)
    if layer.metadata.calibration is not None:
        rows = directions_of(layer)
    places = torch.arange(len(indices))
    parts = (rows @ spectrum.directions.to("cpu", torch.float64).T).abs()
    bounds = turn_bounds(spectrum, indices)
    ahead = parts[places, indices]
    excess = parts - bounds
    excess[places, indices] = 0.0
    worst = float(excess.max())
    if not worst <= 2 * rounding:  # NaN of a map that is none
        return False, f"a row has a part of {worst:.1e} along a direction that is not its own"
    flipped = torch.ones_like(ahead, dtype=torch.bool)
    for nearly in (NEARLY - 4 * rounding, NEARLY + 4 * rounding):
        flipped &= signs(rows, nearly)[:, 0] < 0
    if bool(flipped.any()):
        return False, f"{int(flipped.sum())} rows point the other way"
    others = (parts.square().sum(dim=1) - ahead.square()).clamp(min=0.0).sqrt()
    detail = f"rows in nested order, each its direction to {float(others.max()):.1e}"
    blurred = int((bounds.square().sum(dim=1) > 0.5).sum())
    if blurred:
        detail += f"; {blurred} of them among others with the same singular value"
    if layer.metadata.calibration is not None:
        detail = f"a symmetric positive map of {detail}"
    return True, detail


def directions_of(layer: EmbedFilterLayer) -> Tensor:
    """The directions V under a calibrated filter A V, its polar factor, (k, d) float64."""
    rows = layer.projection.detach().to("cpu", torch.float64)
    squares, axes = torch.linalg.eigh(rows @ rows.T)
    directions: Tensor = (axes * squares.rsqrt()) @ axes.T @ rows
    return directions


def calibration_error(layer: EmbedFilterLayer, encoding: float) -> float:
    """How far two calibrations with the same texts may differ by the rounding of embeddings.

    Of z = A (y - a m) with A = S^(-a/2): embeddings that err by e move S = T^2, in its own axes, by
    at most (t_i + t_j) e and so A by at most |t_i^-a - t_j^-a| / |t_i - t_j| e <= a e / t^(a + 1),
    t the smallest deviation (the divided difference of t^-a); and the mean by e.

    Args:
        layer: The calibrated filter; its directions orthonormal, see `unfolded`.
        encoding: Error of an embedding, relative to its length.

    Returns:
        A bound of the error of A, or of the bias, relative to its own norm.
    """
    record, bias = layer.metadata.calibration, layer.linear.bias
    if record is None or bias is None or not record.strength:
        return _condition(layer) * FLOAT32
    strength = record.strength
    rows = layer.projection.detach().to("cpu", torch.float64)
    shift = bias.detach().to("cpu", torch.float64) / strength
    squares, axes = torch.linalg.eigh(rows @ rows.T)
    factors = squares.clamp(min=1e-300).sqrt()  # t^-a of every axis
    deviations = factors.pow(-1 / strength)
    mean = (axes.T @ shift) / factors
    error = encoding * math.hypot(float(mean.norm()), float(deviations.norm()))
    turned = strength * error * float(factors[-1] / deviations[-1])
    of_map = turned * math.sqrt(len(rows)) / float(factors.norm())
    of_bias = (turned * float(mean.norm()) + float(factors[-1]) * error) / float(shift.norm())
    return 2 * max(of_map, of_bias) + _condition(layer) * FLOAT32


def encoding_error(model: nn.Module) -> float:
    """Error of an embedding relative to its length: every matrix product rounds once more.

    A sum of d terms in float32 errs by sqrt(d) 2^-24 of its norm, its result is rounded to the
    dtype, and errors of n products in a row add up as independent ones: sqrt(n).
    """
    matrices = [value for value in model.parameters() if value.ndim == 2]
    if not matrices:
        return 0.0
    widest = max(value.shape[1] for value in matrices)
    unit = max(torch.finfo(value.dtype).eps for value in matrices if value.is_floating_point()) / 2
    return math.sqrt(len(matrices)) * (unit + math.sqrt(widest) * 2.0**-24)


def _condition(layer: EmbedFilterLayer) -> float:
    """The largest condition number that a filter's rows may have."""
    record = layer.metadata.calibration
    return 1.0 if record is None else MAX_CONDITION ** (record.strength / 2)


def check_spectrum(spectrum: Spectrum, layer: EmbedFilterLayer) -> tuple[bool | None, str]:
    """The stored singular values against those of W_U, all of them.

    Their squares are eigenvalues, which an error E of the Gram matrix moves by |E| <= |E|_F at most
    (Weyl).
    """
    stored = layer.singular_values
    if stored is None:
        return None, "none is stored; save the model anew with this package to store one"
    squares = spectrum.singular_values.square()
    limit = 2 * spectrum.float32_errors().norm() + spectrum.d * 2.0**-52 * squares[0]
    error = (stored.cpu().square() - squares).abs()
    place = int(error.argmax())
    good = bool((error <= limit).all())
    relative = float(error[place] / squares[0])
    return good, (
        f"{spectrum.d} singular values, squares to {relative:.1e} of the largest"
        if good
        else f"singular value {place} is stored as {float(stored[place]):.6g}, is "
        f"{float(spectrum.singular_values[place]):.6g}"
    )


def sine(a: Tensor, b: Tensor) -> float:
    """Sine of the largest principal angle between two row spaces of the same dimension."""
    first, second = (torch.linalg.qr(matrix.T)[0] for matrix in (a, b))
    return float(torch.linalg.matrix_norm(second - first @ (first.T @ second), ord=2))


def check_prefixes(spectrum: Spectrum, layer: EmbedFilterLayer) -> tuple[bool, str]:
    """Every prefix of half the width before it spans what the filter built anew spans there."""
    expected = spectrum.projection(layer.metadata.band).to(torch.float64)
    rows = layer.projection.detach().to("cpu", torch.float64)
    k = rows.shape[0]
    record = layer.metadata.calibration
    indices = torch.as_tensor(layer.metadata.band.indices(spectrum.d))
    worst, failed = 0.0, []
    # Calibration mixes the directions, but never leaves the space of all of them.
    for width in [k] if record is not None else [k >> i for i in range(k.bit_length())]:
        kept = torch.zeros(spectrum.d, dtype=torch.bool)
        kept[indices[:width]] = True
        across = turn_bounds(spectrum, indices[:width])[:, ~kept]
        angle = sine(rows[:width], expected[:width])
        worst = max(worst, angle)
        # A Frobenius norm bounds the largest sine; so does it that of the rounded rows.
        rounding = 4 * FLOAT32 * math.sqrt(width) * _condition(layer)
        if angle > float(across.square().sum().sqrt()) + rounding:
            failed.append(width)
    if failed:
        return False, f"another space at width {', '.join(map(str, failed))}: sine {worst:.1e}"
    return True, f"the same space at every prefix: sine of the largest angle {worst:.1e}"


def odd_numbers(config: Any, where: str = "") -> Iterator[str]:
    """Numbers in a model's configuration with which no layer can compute: NaN, odd epsilons."""
    if isinstance(config, dict):
        for key, value in config.items():
            name = f"{where}.{key}" if where else str(key)
            small = value is not None and (key.endswith(("_eps", "_epsilon")) or key == "eps")
            if small and not (type(value) in (int, float) and 0 <= value <= 1):
                yield f"{name} is {value!r:.40}"
            elif key == "__float__" and value == "NaN":
                yield f"{where} is NaN"
            else:
                yield from odd_numbers(value, name)
    elif isinstance(config, list):
        for i, value in enumerate(config):
            yield from odd_numbers(value, f"{where}[{i}]")
    elif isinstance(config, float) and math.isnan(config):
        yield f"{where} is NaN"


def check_backbone(source: Source) -> tuple[bool, str]:
    """The backbone is read by transformers, every tensor is there, and each value is a number."""
    try:
        model, report = AutoModel.from_pretrained(
            source.name, output_loading_info=True, dtype="auto", **source.for_transformers()
        )
    except Exception as error:  # files of strangers fail in many ways, all mean the same
        return False, f"transformers cannot load it: {first_line(error)}"
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(map(str, report[kind]))
        if names:
            what = kind.replace("_keys", "")
            return False, f"{len(names)} tensors {what}, e.g. {shown(names[0])}: random numbers"
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not is_finite(value):
            return False, f"{name} holds NaN or Inf"
    with reading("the tokenizer", FormatError, "read a short text"):
        tokenizer: Any = AutoTokenizer.from_pretrained(source.name, **source.for_transformers())
        ids = tokenizer("A text.")["input_ids"]
    rows = model.get_input_embeddings().weight.shape[0]
    if ids and not 0 <= min(ids) <= max(ids) < rows:
        return False, f"the tokenizer gives the id {max(ids)}, of {rows} tokens"
    return True, "every tensor is there and finite"

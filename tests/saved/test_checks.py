"""What `verify` allows for follows from theory: a true model passes, whatever it was rounded by."""

import math

import pytest
import torch
from scipy import linalg
from torch import Tensor

from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.saved import checks
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import NEARLY, signs, spectrum_of
from st_embfilter.spectrum.whitening import Calibration, affine_map, moments
from st_embfilter.unembedding.matrix import Provenance
from tests.conftest import planted

D, ROWS, PIECE = 48, 3000, 1024


def layer_of(
    rows: Tensor,
    band: Band,
    *,
    values: Tensor | None = None,
    bias: Tensor | None = None,
    strength: float = 1.0,
) -> EmbedFilterLayer:
    """A filter with these rows; calibrated if there is a bias."""
    head = Provenance("head", (ROWS, rows.shape[1]), "float32", False, "0" * 64)
    record = None if bias is None else Calibration("texts", 100, "0" * 64, strength, 0.1)
    return EmbedFilterLayer(
        rows, FilterMetadata(head, band, calibration=record), singular_values=values, bias=bias
    )


def head() -> Tensor:
    """Not centred, as the heads of language models: one direction far above the others."""
    values = torch.cat([torch.tensor([40.0]), torch.linspace(2, 1, D - 1)])
    return planted(ROWS, values, dtype=torch.float32)[0]


def summed_one_by_one(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrix of float32 sums in the worst order, with a rounding for every product as well."""
    gram = torch.zeros(D, D, dtype=torch.float64)
    for piece in weight.split(PIECE):
        total = torch.zeros(D, D)
        for row in piece:
            total += row[:, None] * row
        gram += total
    values, columns = linalg.eigh(gram.numpy())
    directions = torch.from_numpy(columns.T.copy()).flip(0)
    return torch.from_numpy(values).flip(0).sqrt(), directions * signs(directions)


def test_a_model_from_the_worst_arithmetic_passes_and_a_turned_one_does_not() -> None:
    weight = head()
    values, directions = summed_one_by_one(weight)
    for precision in ("float32", "float64"):
        found = spectrum_of(lambda: weight.split(512), D, precision=precision)
        for band in (Band("bulk", 0.5), Band("offset", 20, offset=3), Band("random", 30, seed=1)):
            rows = directions[band.indices(D)].float()
            layer = layer_of(rows, band, values=values)
            for check in (checks.check_directions, checks.check_prefixes, checks.check_spectrum):
                assert check(found, layer)[0] is True, check(found, layer)
            # A turn of two neighbours by three degrees, far more than any arithmetic leaves here.
            turn = torch.eye(len(rows))
            turn[:2, :2] = torch.tensor([[math.cos(0.05), math.sin(0.05)], [-math.sin(0.05), 1]])
            assert checks.check_directions(found, layer_of(turn @ rows, band))[0] is False


def test_float32_sums_stay_below_the_bound_in_any_order() -> None:
    weight = head()
    found = spectrum_of(lambda: weight.split(512), D)
    exact = weight.double().T @ weight.double()
    bound = found.float32_errors()
    for total in (
        sum((piece.T @ piece).double() for piece in weight.split(PIECE)),
        sum(
            sum(row[:, None] * row for row in piece).double()  # type: ignore[misc]
            for piece in weight.split(PIECE)
        ),
    ):
        error = ((total - exact) @ found.directions.T).norm(dim=0)
        assert bool((error > 0).all())
        assert bool((error <= bound).all())
    # And it says something: no more than sqrt(n) roundings of the whole.
    whole = math.sqrt(PIECE) * 2.0**-24 * float(found.singular_values.square().sum())
    assert float(bound.norm()) <= whole


def test_a_sign_that_hangs_on_the_last_bits_may_be_either() -> None:
    directions = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    first = torch.full((D,), 0.01, dtype=torch.float64)
    first[1], first[0] = 1.0, -NEARLY
    directions[0] = first
    directions = torch.linalg.qr(directions.T)[0].T  # the first row stays, but for its length
    left = torch.linalg.qr(torch.randn(ROWS, D, dtype=torch.float64))[0]
    weight = (left * torch.linspace(2, 1, D, dtype=torch.float64)) @ directions
    found = spectrum_of(lambda: weight.split(512), D)
    rows = found.projection(Band("dominant", 8))
    for row, passes in ((0, True), (1, False)):
        flipped = rows.clone()
        flipped[row] *= -1
        good, said = checks.check_directions(found, layer_of(flipped, Band("dominant", 8)))
        assert good is passes
        assert passes or said == "1 rows point the other way"


def of_errors(kind: str, points: Tensor, error: float) -> Tensor:
    """Errors of that length relative to the embeddings: any, all the same, or the worst ones."""
    generator = torch.Generator().manual_seed(1)
    length = error * float(points.square().sum(dim=1).mean().sqrt())
    centred = points - points.mean(dim=0)
    axis = torch.linalg.eigh(centred.T @ centred)[1][:, :1]
    if kind == "worst":  # along the smallest axis, where the map is largest
        return length * torch.sign(centred @ axis) * axis.T
    noise = torch.randn(points.shape, generator=generator, dtype=torch.float64)
    if kind == "same":
        noise = noise[:1].expand_as(points)
    return length * torch.nn.functional.normalize(noise, dim=1)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["any", "same", "worst"])
@pytest.mark.parametrize("error", [1e-7, 1e-5, 1e-3])
def test_embeddings_that_err_move_a_calibration_within_its_bound(
    kind: str, error: float, strength: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    deviations = torch.logspace(0, -1.5, 12, dtype=torch.float64)
    points = torch.randn(400, 12, generator=generator, dtype=torch.float64) * deviations + 30.0
    matrix, bias = affine_map(moments(points), strength)
    other, shift = affine_map(moments(points + of_errors(kind, points, error)), strength)
    found = layer_of(matrix, Band("bulk", 1.0), bias=bias, strength=strength)
    bound = checks.calibration_error(found, error)
    moved = max(
        float((other - matrix).norm() / matrix.norm()), float((shift - bias).norm() / bias.norm())
    )
    assert moved <= bound
    if kind == "worst":
        assert bound <= 1e3 * error / float(deviations[-1]) * float(points.norm(dim=1).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_backbone(dtype: torch.dtype) -> None:
    """A product in the dtype against one in float64, over layers that keep the length."""
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(16)))
    for layer in layers:
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
        layer.weight.data = rotation.to(dtype)
    x = torch.randn(50, 64, generator=generator).to(dtype)
    with torch.no_grad():
        found = layers(x).double()
        exact = layers.double()(x.double())
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error <= checks.encoding_error(layers.to(dtype))


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> tuple[bool, str]:
        raise RuntimeError("INTERNAL ASSERT FAILED\nsomewhere")

    def stopped() -> tuple[bool, str]:
        raise KeyboardInterrupt

    found = checks.attempt("rows", broken)
    assert (found.passed, found.word) == (False, "FAILED")
    assert "INTERNAL ASSERT FAILED" in found.detail
    assert "somewhere" not in found.detail
    with pytest.raises(KeyboardInterrupt):
        checks.attempt("rows", stopped)

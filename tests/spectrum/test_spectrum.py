"""The spectrum equals a float64 SVD; bands are nested windows of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from st_embfilter.errors import (
    BandError,
    DegenerateEdgeWarning,
    PrecisionError,
    UnembeddingError,
)
from st_embfilter.spectrum.band import FAMILIES, Band
from st_embfilter.spectrum.gram import (
    FLOAT32_TOLERANCE,
    PREFIX_TOLERANCE,
    GramAccumulator,
    spectrum_of,
    spectrum_of_weight,
)
from tests.conftest import DEMO_LM, planted, sine

FAMILY_BANDS = [
    Band("bulk", 1.0),
    Band("dominant", 1.0),
    Band("secondary", 1.0),
    Band("edges", 1.0),
    Band("random", 1.0, seed=3),
]


def gapped(d: int, band: Band, ratio: float = 0.9, gap: float = 2e-3) -> torch.Tensor:
    """A slowly falling spectrum with a relative gap at the edges of a band's window."""
    values = torch.linspace(1.0, ratio, d, dtype=torch.float64)
    start, k = band.start(d), band.width(d)
    values[start:] -= gap
    values[start + k :] -= gap
    return values


def blur(values: torch.Tensor) -> float:
    """d eps s_0^2 / gap: how far float64 may turn one direction of two that have these values.

    Of the Gram matrix, whose error is at most d eps |W|^2, by first-order perturbation.
    """
    squares = values.double().square()
    gap = float((squares[:-1] - squares[1:]).min())
    return len(values) * torch.finfo(torch.float64).eps * float(squares[0]) / gap


def turn(values: torch.Tensor, band: Band) -> float:
    """The largest sine between a projection and an exact subspace, from dtypes and gaps alone."""
    d, kept = len(values), torch.zeros(len(values), dtype=torch.bool)
    kept[band.indices(d)] = True
    squares = values.double().square()
    gap = float((squares[:-1] - squares[1:])[kept[:-1] != kept[1:]].min())
    float64 = d * torch.finfo(torch.float64).eps * float(squares[0]) / gap
    # Rounding to float32 moves each of k unit rows by 2^-24 at most; both sides have the first.
    return 2 * float64 + band.width(d) ** 0.5 * 2.0**-24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_subspace_of_a_planted_spectrum(dtype: torch.dtype) -> None:
    d, band = 64, Band("bulk", 0.5)
    weight, _ = planted(1000, gapped(d, band), dtype=dtype)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    spectrum = spectrum_of_weight(weight, rows_per_block=96)
    # An eigenvalue s^2 moves by d eps s_0^2 at most (Weyl), so s by half of that over s.
    relative = d * torch.finfo(torch.float64).eps * float(exact.S[0] / exact.S[-1]) ** 2
    assert torch.allclose(spectrum.singular_values, exact.S, rtol=relative)
    assert sine(spectrum.projection(band), exact.Vh[16:48]) <= turn(exact.S, band)


def test_subspace_of_the_demo_lm() -> None:
    weight = load_file(DEMO_LM / "model.safetensors")["model.embed_tokens.weight"]
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    spectrum = spectrum_of_weight(weight)
    for keep in (0.5, 0.25, 0.125):
        band = Band("bulk", keep)
        start, k = band.start(256), band.width(256)
        assert sine(spectrum.projection(band), exact.Vh[start : start + k]) <= turn(exact.S, band)


@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_bfloat16_with_condition_number_1e4(precision: str) -> None:
    d, band = 128, Band("bulk", 0.5)
    values = torch.logspace(0, -4, d, dtype=torch.float64)
    weight, _ = planted(4000, values, dtype=torch.bfloat16)
    exact = torch.linalg.svd(weight.double(), full_matrices=False)
    spectrum = spectrum_of(lambda: weight.split(500), d, band=band, precision=precision)
    limit = FLOAT32_TOLERANCE if precision == "auto" else turn(exact.S, band)
    assert sine(spectrum.projection(band), exact.Vh[32:96]) <= limit


def test_float32_error_estimate_bounds_the_true_error() -> None:
    d, band = 128, Band("bulk", 0.5)
    weight, _ = planted(6000, torch.linspace(2, 1, d), dtype=torch.float32)
    blocks = lambda: weight.split(512)  # noqa: E731
    fast = spectrum_of(blocks, d, band=band, precision="float32")
    exact = spectrum_of(blocks, d, band=band, precision="float64")
    error = sine(fast.projection(band), exact.projection(band))
    # A Frobenius norm is at most sqrt(k) times the largest sine, which is one draw: see its class.
    assert 0 < error <= fast.subspace_error(band) <= 3 * 64**0.5 * error
    assert exact.subspace_error(band) == 0.0


def test_auto_recomputes_in_float64_only_where_float32_is_not_enough() -> None:
    passes = 0

    def run(values: torch.Tensor) -> float:
        nonlocal passes
        passes = 0
        weight, _ = planted(2000, values, dtype=torch.float32)

        def blocks() -> tuple[torch.Tensor, ...]:
            nonlocal passes
            passes += 1
            return weight.split(256)

        band = Band("bulk", 0.5)
        spectrum = spectrum_of(blocks, 64, band=band, precision="auto")
        return spectrum.subspace_error(band)

    assert 0 < run(torch.linspace(3, 1, 64)) <= FLOAT32_TOLERANCE
    assert passes == 1
    assert run(torch.logspace(0, -3, 64)) == 0.0
    assert passes == 2


def test_the_error_of_every_prefix_is_the_one_of_its_own_window() -> None:
    d = 40
    weight, _ = planted(3000, torch.logspace(1, -1, d), dtype=torch.float32)
    fast = spectrum_of(lambda: weight.split(512), d, precision="float32")
    assert fast.rounding is not None
    squares, norms = fast.singular_values.square(), fast.rounding.square()
    for band in [Band("bulk", 31), Band("offset", 20, offset=3), *FAMILY_BANDS]:
        errors, order = fast.prefix_errors(band), band.indices(d)
        assert len(errors) == len(order)
        for m in range(1, len(order) + 1):
            kept = torch.zeros(d, dtype=torch.bool)
            kept[order[:m]] = True
            pairs = norms[kept][:, None] * norms[~kept] / norms.sum()
            gaps = squares[kept][:, None] - squares[~kept]
            # Sums of positive terms: d additions, each right to eps.
            expected = (pairs / gaps.square()).sum().sqrt()
            assert torch.allclose(errors[m - 1], expected, rtol=d * d * 2e-16, atol=0)
        assert fast.subspace_error(band) == errors[-1]


def test_float32_turns_no_prefix_by_more_than_three_times_its_estimate() -> None:
    # Not centred, as the heads of language models: one direction far above the others.
    d, band = 96, Band("bulk", 1.0)
    values = torch.cat([torch.tensor([40.0]), torch.linspace(2, 1, d - 1)])
    weight, _ = planted(20_000, values, dtype=torch.bfloat16)
    blocks = lambda: weight.split(8192)  # noqa: E731
    exact = spectrum_of(blocks, d)
    fast = spectrum_of(blocks, d, precision="float32")
    rows = band.indices(d)
    errors = fast.prefix_errors(band)
    for m in range(1, d):
        turned = sine(fast.directions[rows[:m]], exact.directions[rows[:m]])
        assert 0 < turned <= 3 * errors[m - 1]


def test_auto_looks_at_every_prefix() -> None:
    passes = 0
    # Both ends of the window of 32 stand apart; two neighbours inside it nearly tie.
    d, band = 64, Band("bulk", 0.5)
    values = gapped(d, band, ratio=0.5, gap=5e-2)
    values[25] = values[26] * (1 + 1e-7)
    weight, _ = planted(2000, values, dtype=torch.float32)

    def blocks() -> tuple[torch.Tensor, ...]:
        nonlocal passes
        passes += 1
        return weight.split(256)

    fast = spectrum_of(blocks, d, band=band, precision="float32")
    assert fast.subspace_error(band) <= FLOAT32_TOLERANCE
    assert fast.prefix_errors(band).max() > PREFIX_TOLERANCE
    passes = 0
    assert spectrum_of(blocks, d, band=band, precision="auto").rounding is None
    assert passes == 2


@pytest.mark.parametrize("precision", ["auto", "float64"])
@pytest.mark.parametrize("values", ["equal", "rank-deficient"])
def test_a_degenerate_edge_is_told(values: str, precision: str) -> None:
    d = 32
    planted_values = torch.linspace(2, 1, d, dtype=torch.float64)
    if values == "equal":
        planted_values[7] = planted_values[8]
    else:
        planted_values[20:] = 0.0
    weight, _ = planted(500, planted_values)

    def run(band: Band) -> None:
        spectrum_of(lambda: weight.split(128), d, band=band, precision=precision)

    bad = Band("bulk", 16) if values == "equal" else Band("offset", 20, offset=4)
    with pytest.warns(DegenerateEdgeWarning, match=r"window (bulk|offset:4) of .* relative gap"):
        run(bad)
    for good in (Band("bulk", 18 if values == "equal" else 8), Band("dominant", 20)):
        run(good)  # warnings are errors
    run(Band("bulk", 1.0))


def test_bits_do_not_hang_on_the_number_of_workers() -> None:
    weight, _ = planted(3000, torch.linspace(3, 1, 600), dtype=torch.float32)  # several tiles
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [
                spectrum_of(lambda: weight.split(1500), 600, precision=precision)
                for precision in ("float32", "float64")
            ]
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for first, *others in (found[::2], found[1::2]):
        for other in others:
            assert torch.equal(first.directions, other.directions)
            assert torch.equal(first.singular_values, other.singular_values)


def test_blocks_and_their_size_do_not_matter() -> None:
    weight, _ = planted(777, torch.linspace(3, 1, 32))
    whole = spectrum_of_weight(weight, rows_per_block=10_000)
    parts = spectrum_of_weight(weight, rows_per_block=10)
    assert torch.allclose(
        whole.directions, parts.directions, atol=2 * blur(torch.linspace(3, 1, 32))
    )


def test_directions_are_orthonormal_and_signed_by_rule() -> None:
    weight, true = planted(500, torch.linspace(3, 1, 24))
    spectrum = spectrum_of_weight(weight)
    eye = torch.eye(24, dtype=torch.float64)
    # LAPACK's eigenvectors are orthonormal to a modest multiple of d eps.
    eps = 24 * torch.finfo(torch.float64).eps
    assert torch.allclose(spectrum.directions @ spectrum.directions.T, eye, atol=10 * eps)
    largest = spectrum.directions.abs().argmax(dim=1, keepdim=True)
    assert (spectrum.directions.gather(1, largest) > 0).all()
    flipped = spectrum_of_weight(-weight)
    assert torch.equal(spectrum.directions, flipped.directions)  # the products are the same
    assert torch.allclose((spectrum.directions * true).sum(1).abs(), torch.ones(24).double())


def test_signs_do_not_hang_on_the_last_bits_of_tied_entries() -> None:
    # Rows of a Hadamard matrix have entries of equal magnitude everywhere.
    h = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    weight = torch.diag(torch.linspace(4, 1, 16, dtype=torch.float64)) @ h / 4
    first = spectrum_of_weight(weight).directions
    second = spectrum_of_weight(weight.flip(0)).directions
    assert torch.allclose(first, second, atol=2 * blur(torch.linspace(4, 1, 16)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 8), r"at least as many rows .* got shape \(3, 8\)"),
        (torch.zeros(20, 8), "all zero"),
        (torch.ones(20), r"must have shape \(V, d\), got \(20,\)"),
    ],
)
def test_useless_matrices_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(UnembeddingError, match=message):
        spectrum_of_weight(weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_inf_name_their_row(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(100, 8).to(dtype)
    weight[61, 3] = bad
    with pytest.raises(UnembeddingError, match="row 61"):
        spectrum_of_weight(weight, rows_per_block=16)


def test_finite_values_whose_float32_squares_overflow() -> None:
    weight = torch.randn(100, 8) * 1e25
    with pytest.raises(PrecisionError, match="overflow of float32"):
        spectrum_of(lambda: weight.split(20), 8, precision="float32")
    spectrum = spectrum_of(lambda: weight.split(20), 8, precision="auto")
    assert torch.allclose(spectrum.singular_values, torch.linalg.svdvals(weight.double()))


def test_a_block_of_another_width_is_refused() -> None:
    with pytest.raises(UnembeddingError, match=r"\(n, 8\), got \(4, 7\)"):
        GramAccumulator(8).update(torch.ones(4, 7))


# Bands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "keep", "k", "start"),
    [(896, 0.5, 448, 224), (896, 0.25, 224, 336), (4096, 0.125, 512, 1792), (7, 1 / 3, 2, 2)],
)
def test_rounding_is_the_papers(d: int, keep: float, k: int, start: int) -> None:
    band = Band("bulk", keep)
    assert (band.width(d), band.start(d)) == (k, start)
    assert sorted(band.indices(d).tolist()) == list(range(start, start + k))


@given(d=st.integers(1, 400), tau=st.integers(1, 50))
def test_a_ratio_of_one_over_tau_keeps_d_floor_tau(d: int, tau: int) -> None:
    if d // tau:
        assert Band("bulk", 1 / tau).width(d) == d // tau
    else:
        with pytest.raises(BandError):
            Band("bulk", 1 / tau).width(d)


def test_the_order_in_which_windows_grow() -> None:
    assert Band("bulk", 1.0).indices(6).tolist() == [2, 3, 1, 4, 0, 5]
    assert Band("bulk", 1.0).indices(5).tolist() == [2, 1, 3, 0, 4]
    assert Band("offset", 3, offset=2).indices(9).tolist() == [2, 3, 4]


@given(d=st.integers(1, 200), data=st.data())
def test_every_family_is_nested(d: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, d))
    offset = data.draw(st.integers(0, d - k))
    for band in [*FAMILY_BANDS, Band("offset", d - offset, offset=offset)]:
        smaller = band.at(k)
        assert smaller.indices(d).tolist() == band.indices(d)[:k].tolist()
        assert len(set(smaller.indices(d).tolist())) == k


@given(d=st.integers(2, 200), data=st.data())
def test_each_family_keeps_what_its_name_says(d: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, d - 1))
    everything = set(range(d))

    def kept(family: str, width: int) -> set[int]:
        return set(Band(family, width).indices(d).tolist())

    start = (d - k) // 2
    assert kept("bulk", k) == set(range(start, start + k))
    assert kept("edges", d - k) == everything - kept("bulk", k)
    assert kept("dominant", k) == set(range(k))
    assert kept("secondary", k) == set(range(d - k, d))
    assert kept("random", k) <= everything


def test_random_bands_differ_by_seed_alone() -> None:
    one, same = Band("random", 10, seed=1), Band("random", 10, seed=1)
    assert one.indices(99).tolist() == same.indices(99).tolist()
    assert one.indices(99).tolist() != Band("random", 10, seed=2).indices(99).tolist()


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, math.nan, True, "half", None])
def test_keep_out_of_range(keep: object) -> None:
    with pytest.raises(BandError, match=r"keep must be a ratio in \(0, 1\] or an int >= 1, got"):
        Band("bulk", keep)


def test_keep_beyond_the_width() -> None:
    with pytest.raises(BandError, match=r"keep must be in \(0, 1\] or an int in \[1, 8\], got 9"):
        Band("bulk", 9).indices(8)
    with pytest.raises(BandError, match="offset 5 \\+ k 4; keep at most 3"):
        Band("offset", 0.5, offset=5).indices(8)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("bulk", Band("bulk", 0.25)),
        ("offset:128", Band("offset", 0.25, offset=128)),
        ("random:7", Band("random", 0.25, seed=7)),
        ("random", Band("random", 0.25, seed=0)),
    ],
)
def test_bands_are_written_as_text(text: str, band: Band) -> None:
    assert Band.parse(text, 0.25) == band
    assert Band.parse(str(band), 0.25) == band


@pytest.mark.parametrize("text", ["middle", "offset", "offset:x", "bulk:3", "offset:-1", ""])
def test_unknown_bands(text: str) -> None:
    with pytest.raises(BandError):
        Band.parse(text)


def test_a_band_object_brings_its_keep() -> None:
    band = Band("bulk", 0.25)
    assert Band.parse(band) is Band.parse(band, 0.25) is band
    assert Band.parse("bulk") == Band("bulk", 0.5)
    for other in (0.125, 0.5):
        with pytest.raises(BandError, match="brings its own keep"):
            Band.parse(band, other)
    with pytest.raises(BandError, match="brings its own keep"):
        Band.parse(Band("bulk", 1.0), 1)  # everything, or one direction


def test_parameters_of_other_families_are_refused() -> None:
    with pytest.raises(BandError, match="offset"):
        Band("bulk", 0.5, offset=3)
    with pytest.raises(BandError, match="seed"):
        Band("bulk", 0.5, seed=3)
    assert set(FAMILIES) == {"offset", "optimal", *(band.family for band in FAMILY_BANDS)}


# GPU ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_a_gpu_gives_the_cpus_subspace(dtype: torch.dtype, precision: str) -> None:
    weight, _ = planted(20_000, torch.linspace(3, 1, 256), dtype=dtype)
    band = Band("bulk", 0.5)

    def run(device: str) -> torch.Tensor:
        blocks = lambda: weight.split(4096)  # noqa: E731
        spectrum = spectrum_of(blocks, 256, band=band, precision=precision, device=device)
        return spectrum.projection(band)

    assert sine(run("cuda"), run("cpu")) <= (1e-4 if precision == "auto" else 1e-6)

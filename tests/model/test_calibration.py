"""Calibration: the mathematics of the affine map, the texts, the record, the round trip."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.testing import assert_close

import st_embfilter
from st_embfilter.errors import CalibrationError, FormatError
from st_embfilter.model.calibrate import GENERIC_TEXTS, generic_texts
from st_embfilter.model.filter_files import check_parts
from st_embfilter.model.layer import filter_of
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.model.sampling import sample_texts
from st_embfilter.saved.checks import calibration_error
from st_embfilter.spectrum.whitening import (
    MAX_CONDITION,
    MIN_TEXTS,
    Moments,
    affine_map,
    different_texts,
    moments,
    texts_hash,
)
from tests.conftest import FLOAT32, GRAM64, same

TEXTS = [
    f"{verb} the {noun}"
    for verb in ["find", "see", "lift", "hold", "move"]
    for noun in ["cell", "force", "tax", "atom", "river", "king", "law", "wave", "city", "bone"]
]


def cloud(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Correlated vectors away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -1, k, dtype=torch.float64)
    points = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return (points * scale) @ mix + 3.0


def cosines(x: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.normalize(x, dim=-1)
    return x @ x.T


# The map ------------------------------------------------------------------------------------------


def test_full_strength_whitens_the_estimated_covariance() -> None:
    estimate = moments(cloud(500, 12))
    matrix, bias = affine_map(estimate, 1.0)
    assert_close(matrix @ estimate.covariance @ matrix.T, torch.eye(12, dtype=torch.float64))
    assert_close(matrix @ estimate.mean + bias, torch.zeros(12, dtype=torch.float64))


def test_with_many_texts_the_calibrated_vectors_are_white() -> None:
    points = cloud(20_000, 6)
    estimate = moments(points)
    matrix, bias = affine_map(estimate, 1.0)
    white = points @ matrix.T + bias
    # A variance s counts as (1 - a) s + a m, with the shrinkage a and the mean variance m: that of
    # a whitened axis is off by a |s - m| over it; and n - 1 stands for n.
    variances = torch.linalg.eigvalsh(torch.cov(points.T))
    a, m = estimate.shrinkage, float(variances.mean())
    off = a * (variances - m).abs() / ((1 - a) * variances + a * m)
    limit = float(off.max()) + 2 / len(points)
    assert limit < 0.2
    assert_close(torch.cov(white.T), torch.eye(6, dtype=torch.float64), atol=limit, rtol=0)
    assert_close(white.mean(0), torch.zeros(6, dtype=torch.float64), atol=GRAM64, rtol=0)


def test_strength_zero_changes_nothing() -> None:
    matrix, bias = affine_map(moments(cloud(100, 8)), 0.0)
    assert_close(matrix, torch.eye(8, dtype=torch.float64))
    assert_close(bias, torch.zeros(8, dtype=torch.float64))


def test_two_half_strengths_of_the_linear_part_make_a_full_one() -> None:
    estimate = moments(cloud(100, 8))
    half, full = affine_map(estimate, 0.5)[0], affine_map(estimate, 1.0)[0]
    assert_close(half @ half, full)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_cosines_do_not_depend_on_the_basis(strength: float) -> None:
    points = cloud(300, 10)
    rotation = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64))[0]

    def calibrated(x: torch.Tensor) -> torch.Tensor:
        matrix, bias = affine_map(moments(x), strength)
        return x @ matrix.T + bias

    assert_close(cosines(calibrated(points)), cosines(calibrated(points @ rotation)))


def test_the_order_of_the_texts_does_not_matter() -> None:
    points = cloud(200, 5)
    shuffled = points[torch.randperm(200)]
    assert_close(affine_map(moments(points), 1.0), affine_map(moments(shuffled), 1.0))


def test_the_root_keeps_each_output_at_its_direction() -> None:
    """Symmetric and positive: nearest to the filter of all whitening maps."""
    matrix, _ = affine_map(moments(cloud(300, 10)), 1.0)
    assert_close(matrix, matrix.T)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def test_fewer_texts_than_dimensions_stay_stable() -> None:
    estimate = moments(cloud(20, 64))
    assert 0 < estimate.shrinkage <= 1
    matrix, _ = affine_map(estimate, 1.0)
    assert float(torch.linalg.cond(matrix)) <= MAX_CONDITION**0.5 * (1 + GRAM64)


def test_the_condition_number_is_bounded() -> None:
    variances = torch.logspace(0, -12, 5, dtype=torch.float64)
    matrix, _ = affine_map(Moments(torch.zeros(5).double(), variances.diag(), 0.0), 1.0)
    assert float(torch.linalg.cond(matrix)) == pytest.approx(MAX_CONDITION**0.5)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), True])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(CalibrationError, match=r"in \[0, 1\]"):
        affine_map(moments(cloud(50, 4)), strength)


def test_unfit_embeddings() -> None:
    points = cloud(50, 4)
    with pytest.raises(CalibrationError, match="50 times the same"):
        moments(points[:1].expand(50, 4))
    points[3, 2] = float("nan")
    with pytest.raises(CalibrationError, match="must be finite"):
        moments(points)


GENERIC_SHA256 = "3d51bafc2d396f409840d5ccf68778ddc9d51884fffc48b4f09a82304fabac34"


# Texts --------------------------------------------------------------------------------------------


def test_empty_and_repeated_texts_are_dropped() -> None:
    assert different_texts([*TEXTS, "", "  ", *TEXTS]) == TEXTS
    with pytest.raises(CalibrationError, match=f"at least {MIN_TEXTS} different texts, got 2"):
        different_texts(["a", "b"] * 20)
    with pytest.raises(CalibrationError, match="a single string"):
        different_texts("self")


def test_the_hash_tells_where_a_text_ends() -> None:
    assert texts_hash(["ab", "c"]) != texts_hash(["a", "bc"])


def test_the_generic_texts_are_many_short_and_different() -> None:
    texts = generic_texts()
    assert len(texts) == GENERIC_TEXTS == 1024
    assert different_texts(texts) == texts
    assert len({text.lower() for text in texts}) == len(texts)
    assert max(len(text.split()) for text in texts) < 40
    assert texts[:300] == generic_texts(300)


def test_the_generic_texts_never_change() -> None:
    """Models that were calibrated with them are rebuilt from these; others need another name."""
    assert texts_hash(generic_texts()) == GENERIC_SHA256


@pytest.mark.parametrize("count", [MIN_TEXTS - 1, 1025, 100.0, True])
def test_there_are_so_many_generic_texts(demo_lm: Path, count: int) -> None:
    with pytest.raises(CalibrationError, match=r"must be in \[16, 1024\], got"):
        generic_texts(count)
    with pytest.raises(CalibrationError, match=r"must be in \[16, 1024\], got"):
        build(demo_lm, calibrate="generic", calibration_size=count)


# Models -------------------------------------------------------------------------------------------


def build(demo_lm: Path, **kwargs: object) -> SentenceTransformer:
    return st_embfilter.from_causal_lm(
        demo_lm, device="cpu", show_progress_bar=False, **{"calibrate": TEXTS, **kwargs}
    )


def test_the_model_is_the_filter_and_then_the_map(
    demo_lm: Path, demo_model: SentenceTransformer
) -> None:
    model = build(demo_lm, calibration_strength=0.7)
    plain = demo_model.encode(TEXTS, convert_to_tensor=True).double()[:, :128]
    matrix, bias = affine_map(moments(plain), 0.7)
    calibrated = model.encode(TEXTS, convert_to_tensor=True).double()
    # Errors of the embeddings move the moments, and pass through the map.
    error = (
        FLOAT32 * float(plain.norm(dim=1).max()) * float(torch.linalg.matrix_norm(matrix, ord=2))
    )
    expected = plain @ matrix.T + bias
    bound = calibration_error(filter_of(model), FLOAT32) * float(
        matrix.norm() * plain.norm(dim=1).max()
    )
    assert_close(calibrated, expected, atol=error + bound, rtol=0)
    assert bound < 0.1 * float(expected.norm(dim=1).mean())
    at_zero = build(demo_lm, calibration_strength=0).encode(TEXTS, convert_to_tensor=True)
    assert same(at_zero, plain)


def test_normalize_comes_after_and_does_not_disturb(demo_lm: Path) -> None:
    plain = build(demo_lm).encode(TEXTS, convert_to_tensor=True)
    unit = build(demo_lm, normalize=True).encode(TEXTS, convert_to_tensor=True)
    assert same(unit, torch.nn.functional.normalize(plain, dim=-1))


def test_saved_it_is_one_dense_with_a_bias(demo_lm: Path, tmp_path: Path) -> None:
    model = build(demo_lm)
    expected = model.encode(TEXTS)
    st_embfilter.save_pretrained(model, tmp_path / "model")
    assert json.loads((tmp_path / "model/2_Dense/config.json").read_text())["bias"] is True
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert same(plain.encode(TEXTS), expected)
    again = st_embfilter.load(tmp_path / "model", device="cpu")
    assert same(again.encode(TEXTS), expected)
    model.save_pretrained(str(tmp_path / "plugin"))
    live = SentenceTransformer(str(tmp_path / "plugin"), device="cpu", trust_remote_code=True)
    assert same(live.encode(TEXTS), expected)
    assert filter_of(live).metadata == filter_of(model).metadata
    assert live.half()[2].linear.bias.dtype == torch.float32


def test_the_record(demo_lm: Path) -> None:
    record = filter_of(build(demo_lm, calibrate="self", calibration_size=32)).metadata.calibration
    texts = sample_texts(demo_lm, 32, show_progress_bar=False)
    assert (record.source, record.texts, record.seed) == ("self", 32, 0)
    assert record.sha256 == texts_hash(texts)
    given = filter_of(build(demo_lm)).metadata.calibration
    assert (given.source, given.texts, given.seed) == ("texts", len(TEXTS), None)


def test_the_record_of_generic_texts(demo_lm: Path) -> None:
    named = build(demo_lm, calibrate="generic", calibration_size=64)
    record = filter_of(named).metadata.calibration
    assert (record.source, record.texts, record.seed) == ("generic", 64, None)
    assert record.sha256 == texts_hash(generic_texts(64))
    given = build(demo_lm, calibrate=generic_texts(64))
    assert filter_of(given).metadata == filter_of(named).metadata
    assert_close(given.encode(TEXTS), named.encode(TEXTS), atol=0, rtol=0)
    some = filter_of(build(demo_lm, calibrate=generic_texts(64)[1:])).metadata.calibration
    assert some.source == "texts"


def test_a_filter_is_calibrated_once(demo_lm: Path) -> None:
    with pytest.raises(CalibrationError, match="at most once"):
        st_embfilter.calibrate_filter(build(demo_lm), TEXTS)
    with pytest.raises(CalibrationError, match="None, 'generic', 'self' or a sequence"):
        build(demo_lm, calibrate="corpus")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, "must be \\['linear.weight'\\]"),
        (lambda r: {**r, "strength": 2.0}, "in \\[0, 1\\]"),
        (lambda r: {**r, "texts": "many"}, "texts must be int"),
        (lambda r: {**r, "source": "dream"}, "among self, generic, texts"),
    ],
)
def test_a_record_that_does_not_fit(demo_lm: Path, change: object, message: str) -> None:
    layer = filter_of(build(demo_lm))
    document = json.loads(layer.metadata.to_json())
    document["calibration"] = change(document["calibration"])
    with pytest.raises(FormatError, match=message):
        check_parts(layer.weights(), FilterMetadata.from_json(json.dumps(document)), None)

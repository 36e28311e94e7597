"""Average token and spectroscopy equal explicit pseudo-inverses and loops; planted directions."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor

import st_embfilter
from st_embfilter.errors import BandError, FormatError, ShapeError
from st_embfilter.lens.counts import TokenCounts
from st_embfilter.lens.spectroscopy import (
    Spectroscopy,
    average_token,
    optimal_band,
    spectroscopy,
    spectroscopy_of_counts,
)
from st_embfilter.model.metadata import FilterMetadata
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of_weight
from st_embfilter.unembedding.matrix import unembedding_of_tensor
from tests.conftest import GRAM64, planted


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 rows, so that every matrix here comes in several."""
    monkeypatch.setattr("st_embfilter.unembedding.matrix._BLOCK_BYTES", 1)


def log_probabilities(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator, dtype=torch.float64).mul(3).log_softmax(dim=0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("null_directions", [0, 3])
def test_average_token_equals_the_pseudo_inverse(null_directions: int) -> None:
    values = torch.linspace(20, 1, 24, dtype=torch.float64)
    values[24 - null_directions :] = 0
    weight, _ = planted(600, values)
    target = log_probabilities(600)
    expected = target @ torch.linalg.pinv(weight, rtol=1e-10).T
    found = average_token(unembedding_of_tensor(weight), spectrum_of_weight(weight), target)
    assert relative(found, expected) <= GRAM64


def test_spectroscopy_equals_a_loop_over_directions() -> None:
    weight, _ = planted(5000, torch.linspace(9, 1, 16))
    h = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spectrum = spectrum_of_weight(weight)
    groups = {"a": torch.tensor([4999, 3, 700]), "all": torch.arange(5000)}
    found = spectroscopy(unembedding_of_tensor(weight), spectrum, h, groups)
    for name, ids in groups.items():
        logits = weight[ids] @ h
        expected = []
        for v in spectrum.directions:
            removed = weight[ids] @ (h - v * (v @ h))
            expected.append((removed - logits).abs().sum() / logits.abs().sum())
        assert relative(found.shifts[name], torch.stack(expected)) <= GRAM64


def with_frequent_direction(rows: int = 2000, d: int = 32) -> tuple[Tensor, Tensor, TokenCounts]:
    """A matrix in which one direction alone lifts the 100 frequent tokens."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, d, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(
        torch.randn(d, generator=generator, dtype=torch.float64), dim=0
    )
    weight -= (weight @ direction)[:, None] * direction
    weight[:100] += 30 * direction
    counts = torch.ones(rows, dtype=torch.int64)
    counts[:100] = 100_000
    return weight, direction, TokenCounts(counts, texts=1, vocabulary="")


def test_a_planted_direction_of_frequent_tokens_is_found_and_dropped() -> None:
    weight, direction, counts = with_frequent_direction()
    spectrum = spectrum_of_weight(weight)
    found = spectroscopy_of_counts(unembedding_of_tensor(weight), spectrum, counts)
    shift = found.shifts["frequent"]
    worst = int(shift.argmax())
    assert abs(float(spectrum.directions[worst] @ direction)) > 0.99  # 30 against noise of 1
    assert float(shift[worst]) > 3 * float(shift.sort().values[-2])
    band = optimal_band(shift, keep=31)
    assert worst not in band.indices(32).tolist()
    assert worst in Band("dominant", 1).indices(32).tolist()


def test_edges_and_middle_are_means_of_quarters() -> None:
    shift = torch.tensor([8.0, 6.0, 1.0, 2.0, 3.0, 2.0, 5.0, 3.0])
    assert Spectroscopy({"frequent": shift}).edges_and_middle() == {
        "largest": 7.0,
        "middle": 2.0,
        "smallest": 4.0,
    }


def test_shapes_are_checked() -> None:
    weight = torch.randn(50, 4)
    unembedding, spectrum = unembedding_of_tensor(weight), spectrum_of_weight(weight)
    with pytest.raises(ShapeError, match="one for each of the 50 rows"):
        average_token(unembedding, spectrum, torch.zeros(49))
    with pytest.raises(ShapeError, match=r"must have shape \(4,\), got \(5,\)"):
        spectroscopy(unembedding, spectrum, torch.zeros(5), {"a": torch.tensor([1])})
    for ids in ([50], [-1], []):
        with pytest.raises(ShapeError, match=r"must hold ids from 0 to 49, got .* for 'a'"):
            spectroscopy(unembedding, spectrum, torch.zeros(4), {"a": torch.tensor(ids).long()})


# The band ----------------------------------------------------------------------------------------


def test_optimal_keeps_the_smallest_shifts_in_nested_order() -> None:
    shift = torch.tensor([5.0, 1.0, 3.0, 2.0, 9.0, 0.0])
    band = optimal_band(shift, 0.5)
    assert band.indices(6).tolist() == [5, 1, 3]
    for k in range(1, 7):
        assert band.at(k).indices(6).tolist() == [5, 1, 3, 2, 0, 4][:k]
        assert shift[band.at(k).indices(6)].sum() == shift.sort().values[:k].sum()
    assert band.start(6) is None
    assert str(band) == "optimal"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "optimal"}, "'optimal' is measured on a model, got its name alone"),
        ({"family": "bulk", "order": (0, 1)}, "belongs to family 'optimal', got family 'bulk'"),
        ({"family": "optimal", "order": (0, 0, 2)}, "every direction from 0 to d - 1 once"),
        ({"family": "optimal", "order": (1, 2, 3)}, "every direction from 0 to d - 1 once"),
        ({"family": "optimal", "order": (0.0, 1.0)}, "as ints"),
    ],
)
def test_a_bad_order_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BandError, match=message):
        Band(**arguments)  # type: ignore[arg-type]


def test_the_order_must_fit_the_width() -> None:
    with pytest.raises(BandError, match="must hold all 8 directions, got 3"):
        Band("optimal", 2, order=(0, 1, 2)).width(8)


def test_the_order_is_saved_and_rebuilds_the_filter() -> None:
    weight, _, counts = with_frequent_direction()
    unembedding, spectrum = unembedding_of_tensor(weight), spectrum_of_weight(weight)
    shift = spectroscopy_of_counts(unembedding, spectrum, counts).shifts["frequent"]
    layer = st_embfilter.build_filter(weight, band=optimal_band(shift, 0.25))
    text = layer.metadata.to_json()
    read = FilterMetadata.from_json(text)
    assert read == layer.metadata
    rebuilt = st_embfilter.build_filter(weight, band=read.band)
    assert torch.equal(rebuilt.projection, layer.projection)
    again = spectroscopy_of_counts(unembedding, spectrum_of_weight(weight), counts)
    assert optimal_band(again.shifts["frequent"], 0.25) == read.band
    document = json.loads(text)
    for order, message in (
        (document["filter"]["order"][:-1], "must hold all 32 directions, got 31|once"),
        ("0 1 2", "order must be list or null"),
        (None, "got its name alone"),
    ):
        document["filter"]["order"] = order
        with pytest.raises(FormatError, match=message):
            FilterMetadata.from_json(json.dumps(document))
    plain = dataclasses.replace(layer.metadata, band=Band(keep=0.25))
    assert "order" not in json.loads(plain.to_json())["filter"]

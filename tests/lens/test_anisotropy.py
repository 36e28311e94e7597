"""Anisotropy equals the definitions written out, and knows the two extremes."""

import pytest
import torch
from torch import Tensor

from st_embfilter.errors import ShapeError
from st_embfilter.lens.anisotropy import anisotropy
from tests.conftest import FLOAT64, GRAM64


def sample(n: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + 2.0


def mean_cosine(x: Tensor) -> float:
    cosines = [
        float(torch.nn.functional.cosine_similarity(x[i], x[j], dim=0))
        for i in range(len(x))
        for j in range(len(x))
        if i != j
    ]
    return sum(cosines) / len(cosines)


def isoscore(x: Tensor) -> float:
    """The algorithm of the IsoScore paper, step by step."""
    d = x.shape[1]
    covariance = torch.cov(x.T)
    axes = torch.linalg.eigh(covariance).eigenvectors
    diagonal = torch.cov((x @ axes).T).diagonal()
    normalised = d**0.5 * diagonal / diagonal.norm()
    defect = (normalised - 1).norm() / (2 * (d - d**0.5)) ** 0.5
    share = (d - defect**2 * (d - d**0.5)) ** 2 / d**2
    return float((d * share - 1) / (d - 1))


@pytest.mark.parametrize(("n", "d"), [(40, 12), (9, 20), (2, 2)])
def test_equals_the_definitions(n: int, d: int) -> None:
    x = sample(n, d)
    found = anisotropy(x)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    assert found.mean_cosine == pytest.approx(mean_cosine(x), rel=GRAM64)
    assert found.participation_ratio == pytest.approx(
        float(values.sum() ** 2 / values.square().sum()), rel=GRAM64
    )
    assert found.isoscore == pytest.approx(isoscore(x), rel=GRAM64, abs=GRAM64)


def test_the_extremes() -> None:
    even = anisotropy(torch.cat([torch.eye(8), -torch.eye(8)]))
    assert even.mean_cosine == pytest.approx(-1 / 15)
    assert even.participation_ratio == pytest.approx(8)
    assert even.isoscore == pytest.approx(1)
    line = torch.zeros(10, 8)
    line[:, 3] = torch.arange(1, 11)
    found = anisotropy(line)
    assert found.mean_cosine == pytest.approx(1)
    assert found.participation_ratio == pytest.approx(1)
    assert found.isoscore == pytest.approx(0, abs=FLOAT64)


def test_too_few_embeddings() -> None:
    for shape in ((1, 8), (8, 1), (8,)):
        with pytest.raises(ShapeError, match="at least 2 embeddings of at least 2 dimensions"):
            anisotropy(torch.ones(shape))
    with pytest.raises(ShapeError, match="that differ, got 4 times the same"):
        anisotropy(torch.ones(4, 3))

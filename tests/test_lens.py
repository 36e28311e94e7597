"""The logit lens equals the naive softmax over the vocabulary."""

import pytest
import torch

from st_embfilter.errors import ShapeError
from st_embfilter.lens import logit_lens
from st_embfilter.spectrum import Band, spectrum_of_weight
from st_embfilter.unembedding import unembedding_of_tensor


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equals_a_naive_softmax(weight: torch.Tensor) -> None:
    h = torch.randn(7, 16, dtype=torch.float64)
    expected = (h @ weight.T).softmax(dim=1).topk(9, dim=1)
    found = logit_lens(h, unembedding_of_tensor(weight), top_k=9)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=1e-10)


def test_filtered_embeddings_are_read_through_their_projection(weight: torch.Tensor) -> None:
    h = torch.randn(7, 16, dtype=torch.float64)
    v = spectrum_of_weight(weight).directions[Band("bulk", 8).indices(16)]
    expected = (h @ v.T @ v @ weight.T).softmax(dim=1).topk(5, dim=1)
    found = logit_lens(h @ v.T, unembedding_of_tensor(weight), v, top_k=5)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=1e-10)
    prefix = logit_lens(h @ v[:3].T, unembedding_of_tensor(weight), v, top_k=5)
    narrow = (h @ v[:3].T @ v[:3] @ weight.T).topk(5, dim=1)
    assert torch.equal(prefix.ids, narrow.indices)


def test_widths_must_fit(weight: torch.Tensor) -> None:
    unembedding = unembedding_of_tensor(weight)
    with pytest.raises(ShapeError, match="must have the 16 dimensions"):
        logit_lens(torch.randn(2, 15), unembedding)
    with pytest.raises(ShapeError, match="at most 4 dimensions, got 5"):
        logit_lens(torch.randn(2, 5), unembedding, torch.randn(4, 16))

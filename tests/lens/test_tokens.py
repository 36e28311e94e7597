"""The logit lens equals the naive softmax over the vocabulary, at the last layer and between."""

from dataclasses import replace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import st_embfilter
from st_embfilter.errors import DepthError, ShapeError
from st_embfilter.lens.tokens import LensResult, logit_lens, pooled_embeddings
from st_embfilter.model.depth import block_stack
from st_embfilter.model.layer import filter_of
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of_weight
from st_embfilter.unembedding.matrix import unembedding_of_tensor
from tests.conftest import GRAM64, TEXTS, MakeLM, same


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 rows, so that every matrix here comes in several."""
    monkeypatch.setattr("st_embfilter.unembedding.matrix._BLOCK_BYTES", 1)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equals_a_naive_softmax(weight: torch.Tensor) -> None:
    h = torch.randn(7, 16, dtype=torch.float64)
    expected = (h @ weight.T).softmax(dim=1).topk(9, dim=1)
    found = logit_lens(h, unembedding_of_tensor(weight), top_k=9)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=GRAM64)


def test_filtered_embeddings_are_read_through_their_projection(weight: torch.Tensor) -> None:
    h = torch.randn(7, 16, dtype=torch.float64)
    v = spectrum_of_weight(weight).directions[Band("bulk", 8).indices(16)]
    expected = (h @ v.T @ v @ weight.T).softmax(dim=1).topk(5, dim=1)
    found = logit_lens(h @ v.T, unembedding_of_tensor(weight), v, top_k=5)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=GRAM64)
    prefix = logit_lens(h @ v[:3].T, unembedding_of_tensor(weight), v, top_k=5)
    narrow = (h @ v[:3].T @ v[:3] @ weight.T).topk(5, dim=1)
    assert torch.equal(prefix.ids, narrow.indices)


def test_a_calibrated_embedding_is_read_without_its_whitening(weight: torch.Tensor) -> None:
    h = torch.randn(7, 16, dtype=torch.float64)
    v = spectrum_of_weight(weight).directions[Band("bulk", 8).indices(16)]
    square = torch.randn(8, 8, dtype=torch.float64)
    whitening = square @ square.T + torch.eye(8)
    mean = torch.randn(8, dtype=torch.float64)
    z = (h @ v.T - mean) @ whitening
    expected = ((h @ v.T - mean) @ v @ weight.T).softmax(dim=1).topk(5, dim=1)
    found = logit_lens(z, unembedding_of_tensor(weight), whitening @ v, top_k=5)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=GRAM64)


def test_a_folded_filter_is_read_without_its_gain(weight: torch.Tensor) -> None:
    gain = torch.linspace(0.1, 3, 16, dtype=torch.float64)
    v = spectrum_of_weight(weight * gain).directions[Band("bulk", 8).indices(16)]
    n = torch.randn(7, 16, dtype=torch.float64)
    folded = replace(unembedding_of_tensor(weight), gain=gain)
    expected = (n @ v.T @ v @ (weight * gain).T).softmax(dim=1).topk(5, dim=1)
    found = logit_lens(n @ v.T, folded, v / gain, top_k=5)
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.probabilities, expected.values, rtol=GRAM64)
    h = n * gain  # unfiltered: the gain changes nothing
    assert torch.equal(logit_lens(h, folded).ids, logit_lens(h, unembedding_of_tensor(weight)).ids)


def test_widths_must_fit(weight: torch.Tensor) -> None:
    unembedding = unembedding_of_tensor(weight)
    with pytest.raises(ShapeError, match="must have the 16 dimensions"):
        logit_lens(torch.randn(2, 15), unembedding)
    with pytest.raises(ShapeError, match="at most 4 dimensions, got 5"):
        logit_lens(torch.randn(2, 5), unembedding, torch.randn(4, 16))


# Embeddings to look at ---------------------------------------------------------------------------


def last_hidden(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list:
    """The hidden states of one text, as transformers gives them."""
    encoded = tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return model.base_model(**encoded, output_hidden_states=True).hidden_states


FINAL_NORMS = {
    "llama": lambda model: model.model.norm,
    "qwen2": lambda model: model.model.norm,
    "gpt2": lambda model: model.transformer.ln_f,
}


@pytest.mark.parametrize("model_type", FINAL_NORMS)
def test_layers_between_are_normed_once_and_the_last_never(
    make_lm: MakeLM, model_type: str
) -> None:
    folder, lm = make_lm(model_type)
    norm = FINAL_NORMS[model_type](lm)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 3, 32))  # so that norming twice shows
    lm.save_pretrained(folder)
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False)
    text = "the glacier is a cup of light"
    states = last_hidden(lm, model.tokenizer, text)
    assert len(states) == 3
    for layer in range(2):
        with torch.no_grad():
            expected = norm(states[layer]).mean(dim=1)
        found = pooled_embeddings(model, [text], layers=layer, show_progress_bar=False)
        assert same(found, expected)
    for last in (2, None):
        found = pooled_embeddings(model, [text], layers=last, show_progress_bar=False)
        assert same(found, states[2].mean(dim=1))
    with torch.no_grad():
        assert not torch.allclose(norm(states[2]).mean(dim=1), found, rtol=1e-2)
    with pytest.raises(DepthError, match=r"int in \[0, 2\] or a ratio in \(0, 1\], got 3"):
        pooled_embeddings(model, [text], layers=3, show_progress_bar=False)
    # Whatever happened, the model is as before.
    assert len(block_stack(model[0].auto_model)[1]) == 2
    assert model[0].auto_model.config.num_hidden_layers == 2


def test_pooled_embeddings_are_what_the_filter_gets(demo_model: SentenceTransformer) -> None:
    layer = filter_of(demo_model)
    assert layer is not None
    pooled = pooled_embeddings(demo_model, TEXTS, show_progress_bar=False)
    filtered = demo_model.encode(TEXTS, show_progress_bar=False, convert_to_tensor=True)
    assert same(pooled @ layer.projection.T, filtered)


def test_pooled_embeddings_use_the_prompt_of_the_model(demo_model: SentenceTransformer) -> None:
    modules = list(demo_model.children())
    prompted = SentenceTransformer(
        modules=modules, device="cpu", prompts={"say": "Say: "}, default_prompt_name="say"
    )
    with_prompt = pooled_embeddings(prompted, ["tea"], show_progress_bar=False)
    spelled_out = pooled_embeddings(demo_model, ["Say: tea"], show_progress_bar=False)
    assert same(with_prompt, spelled_out)


def test_share_of_tokens() -> None:
    result = LensResult(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 1]]), torch.zeros(2, 4))
    assert result.share_of(torch.tensor([1, 2])) == pytest.approx(3 / 8)

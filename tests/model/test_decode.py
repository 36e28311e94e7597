"""Tokens that are drawn and models that write them: as `generate` does, only faster."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from st_embfilter.errors import CalibrationError
from st_embfilter.model import decode
from st_embfilter.model.decode import draw, write
from tests.architectures import tiny_config
from tests.conftest import MakeLM

#: Shared keys and values, sliding windows, positions of each kind, states instead of keys, and a
#: model without any cache.
KINDS = ["llama", "gemma3_text", "gpt2", "opt", "bloom", "qwen3_moe", "mamba", "openai-gpt"]


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(kind)
    if hasattr(config, "sliding_window"):
        config.sliding_window = 4
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # initial weights are so small that all hidden states look alike
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.generation_config = GenerationConfig(eos_token_id=None)
    return model


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize("kind", KINDS)
def test_models_write_what_they_would(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most probable token each time, with a cache or without."""
    monkeypatch.setattr(decode, "draw", lambda logits: logits.argmax(dim=-1))
    model = tiny(kind)
    prompt = torch.full((3, 1), 5)
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=0,
    )
    assert torch.equal(write(model, 5, 3, 16, 0), expected)


def test_a_text_ends_at_its_end(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = make_lm()
    model.generation_config.eos_token_id = [7, 8]
    given = iter(torch.tensor([[4, 7, 4], [8, 4, 4], [4, 4, 7], [4, 4, 4]]))
    monkeypatch.setattr(decode, "draw", lambda logits: next(given))
    wanted = [[5, 4, 8, 0], [5, 7, 0, 0], [5, 4, 4, 7]]
    assert write(model, 5, 3, 8, 0).tolist() == wanted


@pytest.mark.parametrize(("V", "chunk"), [(5, 2**20), (300, 2**20), (300, 7 * 300), (128, 1)])
def test_tokens_are_drawn_by_their_probability(
    V: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_CHUNK", chunk)
    torch.manual_seed(0)
    wanted = torch.rand(V).square()
    wanted[torch.arange(1, V, 3)] = 0
    wanted /= wanted.sum()
    n = 20_000
    found = torch.bincount(draw(wanted.log().expand(n, V)), minlength=V) / n
    assert len(found) == V
    assert (found[wanted == 0] == 0).all()
    # Six standard deviations of a share, of a hundred shares.
    assert ((found - wanted).abs() <= 6 * (wanted * (1 - wanted) / n).sqrt()).all()


def test_blocks_are_drawn_independently_of_their_tokens() -> None:
    """A token's place in its block says nothing of the block."""
    torch.manual_seed(0)
    n, drawn = 20_000, draw(torch.zeros(20_000, 256))
    low, high = drawn % 128 < 64, drawn >= 128
    share = float((low == high).float().mean())
    assert abs(share - 0.5) <= 5 * 0.5 / n**0.5


@pytest.mark.parametrize("at", [0.0, 0.5, 1 - 2.0**-24, 1.0])
def test_a_place_has_a_weight(at: float) -> None:
    """Rounding leads to no place beyond the last one that has any, nor to one without."""
    weights = torch.tensor([[0.0, 1e-30, 0.0, 1.0, 0.0, 1e-30, 0.0]])
    place = decode._pick(weights, torch.tensor([[at]]))
    assert int(place) == (1 if at == 0 else 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = value
    with pytest.raises(CalibrationError, match="finite logits"):
        draw(logits)


@pytest.mark.parametrize("option", ["softcap", "position_bias", "s_aux"])
def test_other_attention_is_left_to_torch(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def torchs(*args: Any, **options: Any) -> tuple[None, None]:
        given.append(options)
        return None, None

    monkeypatch.setattr(decode, "sdpa_attention_forward", torchs)
    query, key = torch.randn(2, 6, 1, 8), torch.randn(2, 6, 5, 8)
    decode._attend(torch.nn.Module(), query, key, key, None, **{option: 30.0})
    assert given == [{"scaling": None, option: 30.0}]


@pytest.mark.parametrize("mask", ["none", "boolean", "added", "of each head"])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention(mask: str, queries: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment] # as transformers sets it
    query = torch.randn(2, 6, queries, 8)
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    allowed = torch.rand(2, 6 if mask == "of each head" else 1, queries, 5) > 0.4
    allowed[..., 0] = True
    given: dict[str, Any] = {"none": None, "boolean": allowed, "of each head": allowed}
    given["added"] = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
    options = {"attention_mask": given[mask], "scaling": 0.2}
    found, _ = decode._attend(module, query, key, value, **options)
    expected, _ = sdpa_attention_forward(module, query, key, value, **options)
    # Sums of fewer than 16 products of numbers below 4, rounded in another order.
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 16 * 4 * 2.0**-23


def test_attention_of_others_is_left(demo_lm: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_lm, attn_implementation="eager")
    decode.decode_fast(model)
    assert model.config._attn_implementation == "eager"
    model = AutoModelForCausalLM.from_pretrained(demo_lm)
    decode.decode_fast(model)
    assert model.config._attn_implementation == decode._ATTENTION

"""Texts that a language model writes: repeatable, from the start of a document, and looked at."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from st_embfilter.errors import CalibrationError, SampleWarning
from st_embfilter.model import sampling
from st_embfilter.model.sampling import flaws, sample_texts, starts_turn
from st_embfilter.model.tokenizer import start_token
from tests.conftest import MakeLM


def test_samples_are_repeated_by_their_seed(demo_lm: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = sample_texts(demo_lm, 40, seed=1, max_new_tokens=8, show_progress_bar=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one == sample_texts(demo_lm, 40, seed=1, max_new_tokens=8, show_progress_bar=False)
    assert one != sample_texts(demo_lm, 40, seed=2, max_new_tokens=8, show_progress_bar=False)
    assert len(set(one)) == 40
    assert all(text.strip() for text in one)


def test_settings_of_the_checkpoint_do_not_shape_the_texts(make_lm: MakeLM) -> None:
    """Many texts for each, a cold temperature, a length, a token that comes first."""
    folder, _ = make_lm()
    expected = sample_texts(folder, 16, max_new_tokens=4, show_progress_bar=False)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    strange = {"do_sample": True, "num_return_sequences": 1000, "temperature": 0.01}
    strange |= {"max_length": 10**9, "min_length": 10**6, "forced_bos_token_id": 9}
    file.write_text(json.dumps(settings | strange))
    assert sample_texts(folder, 16, max_new_tokens=4, show_progress_bar=False) == expected


#: Of those below, what transformers or the sampler refuses.
REFUSED = {
    "a cache", "an end of words", "an end of 10^30", "an end below zero", "ends in lists",
    "a padding of 10^30", "beams in words", "a temperature in words", "a list",
}  # fmt: skip

#: Settings of generation that would take all memory or run for ever, and such as are none.
STRANGE: dict[str, dict[str, object]] = {
    "many texts": {"num_return_sequences": 100_000, "do_sample": True},
    "many beams": {"num_beams": 100_000},
    "groups of beams": {"num_beams": 100_000, "num_beam_groups": 50_000, "diversity_penalty": 1.0},
    "a length": {"max_length": 10**12},
    "new tokens": {"max_new_tokens": 10**12, "min_new_tokens": 10**12},
    "a time": {"max_time": 0.0},
    "another model": {"assistant_early_exit": 1, "prompt_lookup_num_tokens": 10**9},
    "words that may not come": {"bad_words_ids": [[i] for i in range(100)]},
    "tokens that may not come": {"suppress_tokens": list(range(200))},
    "a watermark": {"watermarking_config": {"bias": 1e9, "greenlist_ratio": 0.5}},
    "code": {"custom_generate": "org/evil"},
    "a cache": {"cache_implementation": "evil"},
    "an end of words": {"eos_token_id": "x"},
    "an end of 10^30": {"eos_token_id": 10**30},
    "an end below zero": {"eos_token_id": -1},
    "ends in lists": {"eos_token_id": [[1], [2]]},
    "a padding of 10^30": {"pad_token_id": 10**30},
    "beams in words": {"num_beams": "x"},
    "a temperature in words": {"temperature": "x", "do_sample": True},
    "a list": {"temperature": [1], "top_k": [], "num_return_sequences": {}},
}


@pytest.mark.filterwarnings("ignore")  # transformers warns before it fails
@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_no_setting_of_a_stranger_reaches_the_sampler(
    make_lm: MakeLM, name: str, file: str
) -> None:
    """The texts are as without it; or there is one error, where an end is none."""
    folder, _ = make_lm()
    expected = sample_texts(folder, 16, max_new_tokens=4, show_progress_bar=False)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | STRANGE[name]))
    try:
        found = sample_texts(folder, 16, max_new_tokens=4, show_progress_bar=False)
    except CalibrationError:
        assert name in REFUSED
    else:
        assert name in REFUSED or found == expected


def test_a_model_that_only_ends(demo_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only_eos(model: object, start: int, rows: int, *args: int) -> torch.Tensor:
        return torch.zeros((rows, 2), dtype=torch.long)

    monkeypatch.setattr(sampling, "write", only_eos)
    with pytest.raises(CalibrationError, match="got 0 in 64 samples"):
        sample_texts(demo_lm, 16, show_progress_bar=False)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)],
)
def test_a_cpu_samples_in_what_it_is_fast_in(
    demo_lm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: dict[str, bool],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    seen = []
    plain = sampling.write

    def write(model: torch.nn.Module, *args: int) -> torch.Tensor:
        seen.append(next(model.parameters()).dtype)
        return plain(model, *args)

    monkeypatch.setattr(sampling, "write", write)
    half = sample_texts(demo_lm, 20, max_new_tokens=8, dtype=torch.float16, show_progress_bar=False)
    assert len(half) == 20
    assert set(seen) == {dtype}


def test_flaws_of_samples() -> None:
    good = [f"{a} {b} {a} {b} {c}" for a, b, c in product("xyz", "uvw", "rst")]
    assert set(flaws(good).values()) == {0.0}
    bad = [*good, *["", good[0], "so so so so so so on", "a", "a"] * 5]
    found = flaws(bad)
    n = len(bad)
    assert found["are empty"] == 5 / n
    assert found["repeat another one"] == (n - len(good) - 3) / n
    assert found["repeat themselves"] == 5 / n
    stories = [f"once upon a time there was a {word}" for word in ("cat", "dog", "fox", "owl")]
    assert flaws(stories)["begin alike"] == 1.0
    assert flaws(stories[:3])["begin alike"] == 0.0


@pytest.mark.parametrize(
    ("line", "flaw"),
    [
        (lambda i: f"Chapter one of book {i} about {i * i}", "100% begin alike"),
        (lambda i: f"{i} " + "very " * 20, "100% repeat themselves"),
    ],
)
def test_samples_that_say_little_are_reported(
    demo_lm: Path, monkeypatch: pytest.MonkeyPatch, line: Callable[[int], str], flaw: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_lm)

    def write(model: object, start: int, rows: int, length: int, pad: int) -> list[list[int]]:
        return [tokenizer(line(i))["input_ids"] for i in range(rows)]

    monkeypatch.setattr(sampling, "write", write)
    with pytest.warns(SampleWarning, match=f"{flaw}.* among 64 samples .* 'generic'"):
        sample_texts(demo_lm, 20, show_progress_bar=False)


def chat_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<|im_start|>", "<|im_end|>", "<bos>", "<|endoftext|>", "a"]
    if "separator" not in special:
        words.remove("<|endoftext|>")
    special.pop("separator", None)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "a")),
        **special,
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    ("special", "start", "turn"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, "<|im_start|>", True),
        ({"eos_token": "<|im_end|>"}, "<|im_end|>", True),
        ({"bos_token": "<|im_start|>", "separator": "yes"}, "<|endoftext|>", False),
        ({"bos_token": "<bos>", "eos_token": "<|im_end|>"}, "<bos>", False),
    ],
)
def test_the_start_of_a_document_is_no_turn_of_a_chat(
    special: dict[str, str], start: str, turn: bool
) -> None:
    tokenizer = chat_tokenizer(**special)
    token = start_token(tokenizer)
    assert tokenizer.convert_ids_to_tokens(token) == start
    assert starts_turn(tokenizer, token) is turn


def test_a_chat_that_knows_no_documents_is_reported(
    demo_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "starts_turn", lambda *_: True)
    with pytest.warns(SampleWarning, match="starts a turn of a chat.*'generic'"):
        sample_texts(demo_lm, 20, max_new_tokens=8, show_progress_bar=False)

"""`make test-models`: three real language models, which `make models MODEL=all` fetches.

Their folder may also be named by ST_EMBFILTER_MODELS. Minutes, and gigabytes in the temporary
folder; the texts of STS-B are looked for in the folder that ST_EMBFILTER_STSB names.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

import st_embfilter
from examples import models
from st_embfilter.model.gguf_backbone import gguf_folder
from st_embfilter.model.tokenizer import leading_ids, start_token
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.gguf import read_gguf

pytest.importorskip("gguf")

# Of its command alone: a model that `make demo` left in the cache must not slow `make test` down.
WANTED = "ST_EMBFILTER_TEST_MODELS" in os.environ
pytestmark = pytest.mark.skipif(not WANTED, reason="real models are tested by make test-models")


@dataclass(frozen=True)
class Facts:
    """What is known of a model.

    Attributes:
        lead: What its tokenizer puts before a plain text.
        start: The token before the first one of a document.
        tied: Whether head and input embedding are one.
        answer: Greedy continuation of "The capital of France is".
    """

    lead: list[str]
    start: str
    tied: bool
    answer: str


FACTS = {
    "smollm2": Facts([], "<|endoftext|>", True, " Paris"),
    "gemma": Facts(["<bos>"], "<bos>", True, " the capital of the country of France"),
    "qwen": Facts([], "<|endoftext|>", False, " Paris"),
}

TEXTS = (
    "The capital of France is",
    # Two spaces before a digit are left out: transformers does not cut at digits for SmolLM2.
    "  two spaces, 1234 digits 5.6e7 and\ttabs\n\nlines ",
    "na\u00efve \U0001f701 \u2603 \u65e5\u672c\u8a9e \u200b",  # byte fallback
    "<|im_start|>user\n<bos><|endoftext|>",
    "",
)


@pytest.fixture(params=FACTS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if not models.path_of(found).is_file():
        pytest.skip(f"no {models.path_of(found)}: make models MODEL={found}")
    return found


def test_the_tokenizer_is_that_of_the_file(name: str) -> None:
    path = models.path_of(name)
    ours = AutoTokenizer.from_pretrained(gguf_folder(path).name)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids[len(FACTS[name].lead) :]) == text
    for token in ("bos_token", "eos_token", "pad_token"):
        assert getattr(ours, token) == getattr(theirs, token)
    assert ours.convert_ids_to_tokens(leading_ids(ours)) == FACTS[name].lead
    assert ours.convert_ids_to_tokens(start_token(ours)) == FACTS[name].start


def test_saved_and_verified(name: str, tmp_path: Path) -> None:
    path = models.path_of(name)
    model = st_embfilter.from_causal_lm(path, device="cpu", show_progress_bar=False)
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert [check.name for check in verify(folder) if not check.passed] == []
    saved = st_embfilter.build_filter(folder, show_progress_bar=False).metadata.provenance
    stored, tied = read_gguf(path)
    assert (saved.tied, tied) == (FACTS[name].tied, FACTS[name].tied)
    assert saved.shape == stored.shape
    embeddings = model.encode(["The glacier retreats.", "Tea is hot."])
    assert np.isfinite(embeddings).all()  # in float16, Gemma in bfloat16: it overflows the other


def test_greedy_continuation_is_that_of_the_file(name: str) -> None:
    """Of the folder, in float32, against transformers' own loading of the file."""
    path = models.path_of(name)
    folder = gguf_folder(path, "float32", show_progress_bar=False).name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = []
    options: list[tuple[str, dict[str, Any]]] = [
        (folder, {}),
        (str(path.parent), {"gguf_file": path.name}),
    ]
    for place, where in options:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **where)
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        written.append(tokenizer.decode(ids[inputs["input_ids"].shape[1] :]))
        del model
    assert written[0] == written[1]
    assert written[0].startswith(FACTS[name].answer)


def test_scores_on_stsb() -> None:
    """SmolLM2, mean pooling, float32: what was measured outside this repository."""
    data = os.environ.get("ST_EMBFILTER_STSB")
    path = models.path_of("smollm2")
    if data is None or not path.is_file():
        pytest.skip("needs SmolLM2, and ST_EMBFILTER_STSB=folder of stsb-en-test.csv")
    file = Path(data) / "stsb-en-test.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.reader(lines) if row]
    model = st_embfilter.from_causal_lm(
        path, keep=0.75, dtype="float32", device="cpu", show_progress_bar=False
    )
    raw = type(model)(modules=list(model.children())[:2], device="cpu")
    texts = [text for row in rows for text in row[:2]]
    vectors = torch.from_numpy(raw.encode(texts)).double()
    filtered = vectors @ model[2].projection.double().T
    for found, expected in (
        (vectors, 37.2),
        (filtered, 43.6),
        (filtered[:, :288], 42.6),
        (filtered[:, :144], 41.8),
        (filtered[:, :72], 37.4),
    ):
        cosine = torch.nn.functional.cosine_similarity(found[::2], found[1::2])
        score = 100 * spearmanr(cosine.numpy(), [float(row[2]) for row in rows]).statistic
        # The figures are of one decimal; ranks of 1,379 pairs hang on the last bits of a few.
        assert score == pytest.approx(expected, abs=0.3)

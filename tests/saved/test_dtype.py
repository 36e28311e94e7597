"""A saved model has the dtype of the live one, and its filter is still proven."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

import st_embfilter
from st_embfilter.errors import BackboneError
from st_embfilter.saved.verify import verify
from tests.conftest import TEXTS, MakeLM

HEAD = {True: "model.embed_tokens.weight", False: "lm_head.weight"}


def stored(folder: Path) -> dict[str, torch.dtype]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: value.dtype for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("source", "asked"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_the_dtype_that_was_asked_for(
    make_lm: MakeLM,
    tmp_path: Path,
    source: torch.dtype,
    asked: torch.dtype,
    tied: bool,
    shards: str,
) -> None:
    lm, _ = make_lm(dtype=source, tie_word_embeddings=tied, shards=shards)
    model = st_embfilter.from_causal_lm(lm, dtype=asked, device="cpu", show_progress_bar=False)
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    found = stored(folder)
    assert set(found) == set(stored(lm))
    head = found.pop(HEAD[tied])
    assert set(found.values()) == {asked}
    assert head == (asked if asked == torch.float32 else source)
    assert json.loads((folder / "config.json").read_bytes())["dtype"] == str(asked)[len("torch.") :]
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (shards == "20KB")
    if index.is_file():
        tensors = [v for f in folder.glob("model-*.safetensors") for v in load_file(f).values()]
        total = json.loads(index.read_bytes())["metadata"]["total_size"]
        assert total == sum(value.nbytes for value in tensors)
    plain = SentenceTransformer(str(folder), device="cpu")
    weights = plain[0].auto_model.state_dict()
    live = model[0].auto_model.state_dict()
    assert {name: value.dtype for name, value in weights.items()} == dict.fromkeys(live, asked)
    assert all(torch.equal(value, live[name]) for name, value in weights.items())
    again = st_embfilter.load(folder, device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(again, model.encode(TEXTS))
    checks = {check.name: check.passed for check in verify(folder, rebuild=True)}
    assert set(checks.values()) == {True}, checks


def test_a_model_that_was_cast_after_it_was_built(make_lm: MakeLM, tmp_path: Path) -> None:
    lm, _ = make_lm()
    model = st_embfilter.from_causal_lm(lm, device="cpu", show_progress_bar=False).bfloat16()
    first = st_embfilter.save_pretrained(model, tmp_path / "first")
    found = stored(first)
    del found[HEAD["lm_head.weight" not in found]]
    assert set(found.values()) == {torch.bfloat16}
    # And from there on it is only copied.
    loaded = st_embfilter.load(first, device="cpu")
    second = st_embfilter.save_pretrained(loaded, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


def test_a_checkpoint_that_says_no_dtype(make_lm: MakeLM, tmp_path: Path) -> None:
    lm, _ = make_lm(dtype=torch.bfloat16)
    config = json.loads((lm / "config.json").read_bytes())
    del config["dtype"]
    (lm / "config.json").write_text(json.dumps(config))
    for asked in (None, torch.float32):
        model = st_embfilter.from_causal_lm(lm, dtype=asked, device="cpu", show_progress_bar=False)
        folder = st_embfilter.save_pretrained(model, tmp_path / str(asked))
        assert set(stored(folder).values()) == {asked or torch.bfloat16}
        dtype = SentenceTransformer(str(folder), device="cpu")[0].auto_model.dtype
        assert dtype == (asked or torch.bfloat16)
        saved = json.loads((folder / "config.json").read_bytes())
        assert saved.pop("is_matryoshka") is True
        assert (saved == config) == (asked is None)


def test_load_tries_one_token(make_lm: MakeLM, tmp_path: Path) -> None:
    lm, _ = make_lm()
    model = st_embfilter.from_causal_lm(lm, device="cpu", show_progress_bar=False)
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_bytes())
    config["rms_norm_eps"] = float("nan")  # whatever the weights
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="finite hidden states"):
        st_embfilter.load(folder, device="cpu")

"""Static models: a table that does what the arithmetic by hand does."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

import st_embfilter
from st_embfilter.errors import DepthError
from st_embfilter.model.static import bag_tokenizer, static_metadata
from st_embfilter.saved.card import write_card
from st_embfilter.saved.push import validate_folder
from st_embfilter.saved.verify import verify
from st_embfilter.spectrum.band import Band
from st_embfilter.unembedding.source import open_unembedding
from tests.conftest import DEMO_LM, FLOAT32, MakeLM, same, word_tokenizer

#: Ten thousand different-looking words in a fixed order.
LONG = " ".join(f"w{(i * i + 7 * i) % 180}" for i in range(10_000))
TEXTS = ["the cup of tea", "sugar", "", "zebra unknown tea", LONG, "<s> tea"]
CALIBRATION = [f"w{i} w{i + 1} tea w{(7 * i) % 90}" for i in range(1, 60)]


def by_hand(folder: Path, tokenizer: Tokenizer, texts: list[str], scale: float = 1) -> np.ndarray:
    """Mean over tokens of norm(embedding), projected, in float64 from the checkpoint's tensors."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    table = tensors["model.embed_tokens.weight"].to(torch.float64) * scale
    gain = tensors["model.norm.weight"].to(torch.float64)
    gain = gain + 1 if config["model_type"].startswith("gemma") else gain
    rms = (table.square().mean(dim=1, keepdim=True) + config["rms_norm_eps"]).sqrt()
    spectrum, _ = open_unembedding(folder).fit(precision="float64")
    rows = table / rms * gain @ spectrum.projection(Band.parse("bulk", 0.5)).to(torch.float64).T
    means = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        means.append(rows[ids].mean(dim=0) if ids else torch.zeros(rows.shape[1]))
    return torch.stack(means).numpy()


@pytest.mark.parametrize("options", [{}, {"dtype": "float32", "token_weights": "sif"}])
def test_the_card_written_anew_is_the_card(
    make_lm: MakeLM, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, layers=0, device="cpu", **options)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    before = (saved / "README.md").read_bytes()
    assert write_card(saved).read_bytes() == before


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_folder_is_the_arithmetic_by_hand(
    make_lm: MakeLM, tmp_path: Path, model_type: str
) -> None:
    folder, _ = make_lm(model_type)
    model = st_embfilter.from_causal_lm(
        folder, layers=0, dtype="float32", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    plain = SentenceTransformer(str(saved), device="cpu")
    tokenizer: Any = plain[0].tokenizer
    scale = 32**0.5 if model_type == "gemma3_text" else 1
    expected = by_hand(folder, tokenizer, TEXTS, scale)
    found = plain.encode(TEXTS)
    assert same(found, expected)
    assert not found[2].any()
    short = SentenceTransformer(str(saved), device="cpu", truncate_dim=4).encode(TEXTS)
    assert np.array_equal(short, found[:, :4])
    loaded = st_embfilter.load(saved, device="cpu")
    metadata = static_metadata(loaded)
    assert metadata is not None
    assert metadata.depth is not None
    assert (metadata.depth.layers, metadata.depth.of) == (0, 2)
    assert all(check.passed for check in verify(saved, base=folder))
    validate_folder(saved)


def test_model2vec_loads_the_folder(tmp_path: Path) -> None:
    """Whole texts; by itself it reads the first 512 tokens."""
    static_model = pytest.importorskip("model2vec").StaticModel
    model = st_embfilter.from_causal_lm(
        DEMO_LM, layers=0, keep=0.5, dtype="float32", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    texts = ["The glacier retreats.", "tea", "ten " * 2000]
    found = static_model.from_pretrained(str(saved)).encode(texts, max_length=None)
    assert same(found, model.encode(texts))


def test_half_precision_if_asked(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(
        folder, layers=0, dtype="float16", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    table = load_file(saved / "0_StaticEmbedding" / "model.safetensors")["embedding.weight"]
    assert table.dtype == torch.float16
    assert table.shape == (200, 16)
    assert 0.5 < table.abs().max() <= 1  # stored times a power of two
    expected = by_hand(folder, model[0].tokenizer, TEXTS[:4])
    found = SentenceTransformer(str(saved), device="cpu").encode(TEXTS[:4]).astype(np.float32)
    found *= 2.0 ** round(math.log2(np.abs(expected).max() / np.abs(found).max()))
    # The mean of rows whose entries are rounded to 11 bits, and are longer than it by a few times.
    assert np.abs(found - expected).max() <= 2**-9 * np.abs(expected).max()
    assert not (saved / "config.json").exists()  # model2vec would take it for its own


@pytest.mark.parametrize("calibrate", [None, CALIBRATION])
def test_long_texts_are_finite_in_float16(
    make_lm: MakeLM, tmp_path: Path, calibrate: list[str] | None
) -> None:
    """The sum of 10,000 rows whose largest entry is 600, as Gemma's is, is above 65,504."""
    folder, _ = make_lm()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 200
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options: Any = {"calibrate": calibrate, "device": "cpu", "show_progress_bar": False}
    model = st_embfilter.from_causal_lm(folder, layers=0, dtype="float16", **options)
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    wide = st_embfilter.from_causal_lm(folder, layers=0, **options)
    assert wide[0].embedding.weight.dtype == torch.float32
    texts = [LONG, "tea " * 60_000]
    found = SentenceTransformer(str(saved), device="cpu").encode(texts).astype(np.float64)
    expected = wide.encode(texts).astype(np.float64)
    for one, other in zip(found, expected, strict=True):
        scale = one @ other / (other @ other)
        # Entries of at most 1, and their mean, are rounded to 11 bits.
        assert np.abs(one - scale * other).max() <= 2**-10
    assert not [check for check in verify(saved, base=folder) if check.passed is False]
    forged = load_file(saved / "0_StaticEmbedding" / "model.safetensors")
    forged["embedding.weight"] *= 2
    save_file(forged, saved / "0_StaticEmbedding" / "model.safetensors")
    assert any(check.passed is False for check in verify(saved, base=folder))


def test_calibration_folds_exactly(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    options: dict[str, Any] = {
        "layers": 0,
        "dtype": "float32",
        "calibrate": CALIBRATION,
        "calibration_strength": 1.0,
        "device": "cpu",
        "show_progress_bar": False,
    }
    model = st_embfilter.from_causal_lm(folder, normalize=True, **options)
    bare = SentenceTransformer(modules=[model[0]], device="cpu")
    embeddings = bare.encode(CALIBRATION).astype(np.float64)
    # What float32 leaves of a vector, through a map with a condition number up to 100.
    limit = 100 * FLOAT32 * np.linalg.norm(embeddings, axis=1).max()
    assert np.abs(embeddings.mean(axis=0)).max() <= limit
    lengths = np.linalg.norm(model.encode(CALIBRATION), axis=1)
    assert same(lengths, np.ones_like(lengths))
    metadata = static_metadata(model)
    assert metadata is not None
    assert metadata.calibration is not None
    assert metadata.calibration.texts == len(CALIBRATION)


def test_weights_scale_tokens_by_rank(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    options: dict[str, Any] = {
        "layers": 0,
        "dtype": "float32",
        "device": "cpu",
        "show_progress_bar": False,
    }
    plain: Any = st_embfilter.from_causal_lm(folder, **options)[0]
    for name, rising in (("zipf", True), ("sif", True)):
        weighted: Any = st_embfilter.from_causal_lm(folder, token_weights=name, **options)[0]
        ratio = weighted.embedding.weight.norm(dim=1) / plain.embedding.weight.norm(dim=1)
        assert bool((ratio[4:].diff() > 0).all()) is rising
    with pytest.raises(DepthError, match="token_weights must be None or one of zipf, sif"):
        st_embfilter.from_causal_lm(folder, token_weights="idf", **options)
    with pytest.raises(DepthError, match="token_weights need layers=0, got layers=None"):
        st_embfilter.from_causal_lm(folder, token_weights="sif")


def test_rows_that_only_pad_the_vocabulary_are_left_out(make_lm: MakeLM) -> None:
    folder, _ = make_lm(vocab_size=230)
    model: Any = st_embfilter.from_causal_lm(
        folder, layers=0, device="cpu", show_progress_bar=False
    )
    assert model[0].embedding.weight.shape[0] == 200


def test_special_tokens_are_read_as_words_and_never_added() -> None:
    tokenizer = bag_tokenizer(word_tokenizer())
    assert "<s>" not in tokenizer.encode("<s> tea", add_special_tokens=True).tokens
    assert tokenizer.encode("tea").ids == word_tokenizer().encode("tea", add_special_tokens=False)


def test_what_a_table_cannot_be(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    for options in ({"prompt": "prompteol"}, {"pooling": "lasttoken"}):
        with pytest.raises(DepthError, match="takes no prompt and no other pooling"):
            st_embfilter.from_causal_lm(folder, layers=0, **options)  # type: ignore[arg-type]
    positions, _ = make_lm("gpt2", name="gpt2")
    with pytest.raises(DepthError, match="GPT2Model, which adds the position; use layers=1"):
        st_embfilter.from_causal_lm(positions, layers=0, device="cpu", show_progress_bar=False)

"""A GGUF file as a language model: weights, tokenizer, saved folder, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import st_embfilter
from st_embfilter.errors import BackboneError, UnembeddingError
from st_embfilter.model.gguf_backbone import gguf_folder
from st_embfilter.model.gguf_tokenizer import gguf_tokenizer
from st_embfilter.model.tokenizer import start_token
from st_embfilter.saved.gguf_out import export_gguf
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.gguf import GGUFFile, read_gguf
from tests.conftest import TEXTS, same

pytest.importorskip("gguf")
from tests.gguf_files import TOKENS, tiny_model, write_gguf

QUIET: dict[str, Any] = {"show_progress_bar": False}


def build(path: Path, **options: Any) -> SentenceTransformer:
    return st_embfilter.from_causal_lm(path, device="cpu", **QUIET, **options)


def weights_of(path: Path, dtype: str) -> dict[str, torch.Tensor]:
    return load_file(Path(gguf_folder(path, dtype, **QUIET).name) / "model.safetensors")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back(tmp_path: Path, architecture: str, tied: bool) -> None:
    if architecture == "gemma3" and not tied:
        pytest.skip("Gemma ties its head")
    model = tiny_model(architecture, tied=tied)
    path = write_gguf(tmp_path / "tiny.gguf", model, architecture)
    found = weights_of(path, "float32")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    # w + 1 - 1 of Gemma's norms rounds to the last bit of numbers below 2; all else is exact.
    rounding = 2.0**-23 if architecture == "gemma3" else 0.0
    for name, value in expected.items():
        assert float((found[name] - value.detach()).abs().max()) <= rounding, name
    folder = gguf_folder(path, "float32", **QUIET).name
    ids = torch.tensor([[5, 80, 200, 258, 31]])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert same(loaded(ids).logits, model(ids).logits)
    assert loaded.config.tie_word_embeddings == tied


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_and_reader_agree_bit_for_bit(tmp_path: Path, kind: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(tied=tied), kind=kind)
    stored, found_tied = read_gguf(path)
    assert found_tied == tied
    matrix = stored.read_rows(0, len(TOKENS))
    for dtype in ("float32", "float16", "bfloat16"):
        source = gguf_folder(path, dtype, **QUIET)
        unembedding = source.unembedding()
        assert torch.equal(
            unembedding.stored.read_rows(0, len(TOKENS)), matrix.to(getattr(torch, dtype))
        )
        assert (unembedding.tied, unembedding.model_id) == (tied, "tiny.gguf")


def test_saved_folder(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf",
        tiny_model(tied=False),
        kind="Q8_0",
        metadata={"general.license": "apache-2.0", "general.name": "Tiny"},
    )
    model = build(path)
    assert next(model[0].parameters()).dtype == torch.float16
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert not list(folder.glob("*.gguf"))
    assert (folder / "model.safetensors").stat().st_mode & 0o044  # as any file that is written
    base = json.loads((folder / "embfilter.json").read_text())["base_model"]
    assert base["id"] == "tiny.gguf"
    assert base["gguf_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert str(tmp_path) not in "".join(
        file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()
    )
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert [check.name for check in verify(folder, rebuild=True) if not check.passed] == []
    # Plain sentence-transformers gives the same vectors but for roundings to 11 bits in another
    # order, of fewer than 400 products in a row: 2^-11 sqrt(400).
    plain = SentenceTransformer(str(folder), device="cpu")
    assert same(plain.encode(TEXTS), model.encode(TEXTS), 1e-2)


def test_build_needs_no_more_than_the_file(tmp_path: Path) -> None:
    """Calibration with the model's own texts, a prompt, and a folder that holds the file."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model())
    model = build(tmp_path, prompt="prompteol", dtype="float32", keep=8)
    assert model.encode(TEXTS).shape == (len(TEXTS), 8)
    texts = st_embfilter.sample_texts(tmp_path / "tiny.gguf", 4, **QUIET)
    assert len(set(texts)) == 4


def test_what_does_not_fit_float16(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    path = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(
        BackboneError,
        match=r"finite in float16 \(at most 65504\), got 1e\+05 in 'model.layers.1.mlp.up_proj",
    ):
        build(path)
    assert float(weights_of(path, "bfloat16")["model.layers.1.mlp.up_proj.weight"].max()) > 9e4
    with pytest.raises(BackboneError, match="float16, bfloat16 or float32, got 'int8'"):
        build(path, dtype="int8")


def test_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(path, **QUIET).name)
    text = "<|im_start|>In the  theatre\u2603\n"
    ids = tokenizer(text)["input_ids"]
    expected = "<|im_start|> I n Ġthe Ġ Ġthe a t r e â ĺ ĥ Ċ"
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == expected
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 64
    # A document does not start a chat.
    assert start_token(tokenizer) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, ["<|im_start|>", "a"]),
        ({"tokenizer.ggml.add_bos_token": None}, ["a"]),
        (
            {"tokenizer.ggml.add_bos_token": None, "tokenizer.ggml.pre": "llama-bpe"},
            ["<|im_start|>", "a"],
        ),
        ({"tokenizer.ggml.add_eos_token": True}, ["a", "<|im_end|>"]),
    ],
)
def test_what_stands_around_a_text(
    tmp_path: Path, changes: dict[str, object], expected: list[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), metadata=changes)
    tokenizer = gguf_tokenizer(GGUFFile.open(path))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"]) == expected


def test_digits_apart(tmp_path: Path) -> None:
    """As llama.cpp cuts a text for SmolLM2: at digits first, then as for GPT-2."""
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_model(), metadata={"tokenizer.ggml.pre": "smollm"}
    )
    tokenizer = gguf_tokenizer(GGUFFile.open(path))
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def patched(path: Path, start: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    target = path.with_name("patched.gguf")
    target.write_bytes(content)
    return target


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    content = path.read_bytes()
    for length in (3, 20, 200, len(content) // 2, len(content) - 40):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(UnembeddingError, match=r"cut\.gguf must be a (whole )?GGUF file"):
            build(tmp_path / "cut.gguf")
    for version, words in (
        (struct.pack(">I", 3), "got big-endian version 3"),
        (struct.pack("<I", 1), "got version 1"),
        (struct.pack("<I", 4), "got version 4"),
    ):
        with pytest.raises(UnembeddingError, match=f"version 2 or 3, {words}"):
            build(patched(path, 4, version))
    part = path.rename(tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(UnembeddingError, match="llama-gguf-split --merge"):
        build(part)


def keyed(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


#: Lists in lists, deeper than a reader's stack.
NESTED = struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (keyed("a", 9, NESTED), "recursion"),
        (keyed("a", 9, struct.pack("<IQ", 10, 2**24 + 1)), "lists of 16,777,217 values"),
        (keyed("a", 9, struct.pack("<IQ", 99, 1)), "metadata of an unknown type"),
        (keyed("a", 8, struct.pack("<Q", 2**60)), "bytes of a header"),
        (keyed("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), "codec can't decode"),
        (keyed("general.alignment", 9, struct.pack("<IQI", 4, 1, 32)), "int"),
        (keyed("general.alignment", 8, struct.pack("<Q", 1) + b"x"), "int"),
        (keyed("general.alignment", 6, struct.pack("<f", math.inf)), "infinity"),
        (keyed("general.alignment", 4, struct.pack("<I", 0)), "general.alignment 0"),
        (keyed("llama.block_count", 4, struct.pack("<I", 1)), "the key 'llama.block_count' twice"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, added: bytes, words: str) -> None:
    content = write_gguf(tmp_path / "tiny.gguf", tiny_model()).read_bytes()
    count = struct.pack("<Q", struct.unpack("<Q", content[16:24])[0] + 1)
    (tmp_path / "forged.gguf").write_bytes(content[:16] + count + added + content[24:])
    with pytest.raises(UnembeddingError, match=rf"must be a whole GGUF file, got .*{words}"):
        build(tmp_path / "forged.gguf")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"tokenizer.ggml.tokens": None}}, "must hold its tokenizer, got none"),
        ({"metadata": {"tokenizer.ggml.model": "mystery"}}, "make the tokenizer .* got 'mystery'"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": "x"}}, "the tokenizer of tiny.gguf must be"),
        ({"metadata": {"tokenizer.ggml.pre": ["x"]}}, "unhashable"),
        ({"metadata": {"tokenizer.ggml.tokens": [1] * 300}}, "make the tokenizer .* not iterable"),
        ({"metadata": {"tokenizer.chat_template": ["x"]}}, "a chat template must be a text"),
        ({"metadata": {"llama.context_length": "x"}}, "the tokenizer of tiny.gguf must be whole"),
        ({"metadata": {"llama.attention.head_count": 0}}, "must be able to read the architecture"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"none for model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"extra": {"blk.0.odd.weight": np.ones(4, np.float32)}}, "got 'blk.0.odd.weight'"),
        ({"metadata": {"llama.block_count": 1}}, "got 'blk.1"),
        ({"metadata": {"llama.embedding_length": 32}}, "must have the shapes of its metadata"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), **options)
    with pytest.raises(BackboneError, match=words):
        build(path)


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "float16"), ("gemma3", "bfloat16")])
def test_default_dtype_holds_the_hidden_states(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    """Those of Gemma leave the range of float16."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(architecture, tied=True), architecture)
    folder = Path(gguf_folder(path, show_progress_bar=False).name)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UnembeddingError, match="must be a file"):
        export_gguf(tmp_path / "pipe.gguf", tmp_path / "out.gguf")
    with pytest.raises(UnembeddingError, match="must exist"):
        build(tmp_path / "pipe.gguf")


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(path.read_bytes().replace(b"llama", b"xlama"))
    with pytest.raises(BackboneError, match=r"from GGUF \(.*gemma3.*llama.*qwen2.*got 'xlama'"):
        build(renamed)

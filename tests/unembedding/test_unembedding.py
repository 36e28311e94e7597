"""W_U is found and streamed from every form of checkpoint, and from a live model."""

import hashlib
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from st_embfilter.errors import UnembeddingError
from st_embfilter.model.build import build_filter
from st_embfilter.unembedding.matrix import Unembedding, unembedding_of_tensor
from st_embfilter.unembedding.source import (
    model_identity,
    open_unembedding,
    unembedding_of_model,
)
from tests.conftest import MakeLM


def read(unembedding: Unembedding, rows: int = 7) -> torch.Tensor:
    return torch.cat(list(unembedding.blocks(rows)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["file", "shards", "bin"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_folder_gives_the_output_embedding(
    make_lm: MakeLM, model_type: str, form: str, tied: bool
) -> None:
    folder, model = make_lm(
        model_type,
        shards="20KB" if form == "shards" else "50GB",
        torch_bin=form == "bin",
        tie_word_embeddings=tied,
    )
    assert (folder / "model.safetensors.index.json").exists() == (form == "shards")
    found = open_unembedding(folder)
    assert torch.equal(read(found), model.get_output_embeddings().weight)
    assert found.tied is tied
    assert found.model_id == "lm"


def test_live_model_and_folder_agree(make_lm: MakeLM) -> None:
    folder, model = make_lm(dtype=torch.bfloat16, tie_word_embeddings=False)
    live, stored = unembedding_of_model(model), open_unembedding(folder)
    assert live.provenance().sha256 == stored.provenance().sha256
    assert live.stored.name == stored.stored.name == "lm_head.weight"
    assert live.provenance().dtype == "bfloat16"


def test_a_wider_live_copy_hashes_as_stored(make_lm: MakeLM) -> None:
    folder, model = make_lm(dtype=torch.bfloat16)
    stored = open_unembedding(folder).provenance()
    wide = unembedding_of_model(model.to(torch.float32))
    assert wide.provenance().sha256 != stored.sha256
    assert wide.provenance(torch.bfloat16).sha256 == stored.sha256


def test_hash_is_of_the_stored_bytes(make_lm: MakeLM) -> None:
    folder, _ = make_lm(dtype=torch.float16)
    raw = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    entry = json.loads(raw[8 : 8 + length])["model.embed_tokens.weight"]
    if "lm_head.weight" in json.loads(raw[8 : 8 + length]):
        entry = json.loads(raw[8 : 8 + length])["lm_head.weight"]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    expected = hashlib.sha256(raw[start:stop]).hexdigest()
    assert open_unembedding(folder).provenance().sha256 == expected
    assert open_unembedding(folder).fit()[1].sha256 == expected


def test_a_backbone_saved_without_its_tied_head(make_lm: MakeLM) -> None:
    folder, model = make_lm(tie_word_embeddings=True)
    bare = folder.with_name("bare")
    model.base_model.save_pretrained(bare)
    assert "embed_tokens.weight" in load_file(bare / "model.safetensors")
    assert torch.equal(read(open_unembedding(bare)), model.get_output_embeddings().weight)


def test_a_backbone_saved_without_its_untied_head(make_lm: MakeLM) -> None:
    folder, model = make_lm(tie_word_embeddings=False)
    bare = folder.with_name("bare")
    model.base_model.save_pretrained(bare)
    with pytest.raises(UnembeddingError, match=r"must hold the output embedding \(lm_head.weight"):
        open_unembedding(bare)


def test_config_says_tied_but_the_head_is_stored_apart(make_lm: MakeLM) -> None:
    """transformers loads the stored head then, and so must we."""
    folder, model = make_lm(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(read(open_unembedding(folder)), model.get_output_embeddings().weight)


def test_only_the_head_is_read(make_lm: MakeLM) -> None:
    folder, model = make_lm(shards="20KB", tie_word_embeddings=False)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    head = index["weight_map"]["lm_head.weight"]
    for shard in folder.glob("*.safetensors"):
        if shard.name != head:
            shard.unlink()
    assert torch.equal(read(open_unembedding(folder)), model.get_output_embeddings().weight)


@pytest.mark.parametrize("rows", [1, 7, 200, 1000])
def test_blocks_cover_all_rows_in_order(rows: int) -> None:
    weight = torch.arange(200 * 8, dtype=torch.float32).view(200, 8)
    seen: list[torch.Tensor] = []
    blocks = list(unembedding_of_tensor(weight).blocks(rows, seen=seen.append))
    assert torch.equal(torch.cat(blocks), weight)
    assert torch.equal(torch.cat(seen), weight)
    assert {block.shape[0] for block in blocks[:-1]} <= {rows}


def test_progress_counts_bytes() -> None:
    calls: list[tuple[int, int]] = []
    unembedding_of_tensor(torch.randn(1000, 8)).fit(progress=lambda *call: calls.append(call))
    assert calls[-1] == (32_000, 32_000)


def test_a_reader_that_fails_raises_and_does_not_hang() -> None:
    unembedding = unembedding_of_tensor(torch.randn(1000, 8))

    def broken(first: int, last: int) -> torch.Tensor:
        raise UnembeddingError("disk gone")

    object.__setattr__(unembedding.stored, "read_rows", broken)
    with pytest.raises(UnembeddingError, match="disk gone"):
        unembedding.fit()


def test_sources_of_every_kind(make_lm: MakeLM) -> None:
    folder, model = make_lm()
    weight = model.get_output_embeddings().weight
    for source in (folder, str(folder), model, weight, unembedding_of_tensor(weight)):
        assert torch.equal(read(open_unembedding(source)), weight)


# Errors ------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UnembeddingError, match="a model folder must exist, got"):
        open_unembedding(tmp_path / "nothing")
    with pytest.raises(UnembeddingError, match=r"must hold config\.json"):
        open_unembedding(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "got the encoder-only model type 'bert'"),
        ({"model_type": "t5"}, "got the encoder-decoder 't5'"),
        ({"model_type": "no-such-model"}, "must describe a model that transformers knows"),
        ({"model_type": "vit"}, "must describe|AutoModelForCausalLM can build"),
        ({}, "must describe a model that transformers knows"),
    ],
)
def test_configs_without_a_decoder(tmp_path: Path, config: dict[str, str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnembeddingError, match=message):
        build_filter(tmp_path)


def test_no_weights(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnembeddingError, match=r"must hold model\.safetensors or pytorch_model"):
        open_unembedding(folder)


def test_head_of_another_shape(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnembeddingError, match=r"\(300, 32\), got \(200, 32\)"):
        open_unembedding(folder)


def test_model_without_output_embedding(make_lm: MakeLM) -> None:
    _, model = make_lm()
    with pytest.raises(UnembeddingError, match="LlamaModel, which has none"):
        unembedding_of_model(model.base_model)


def header_of(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "U8"}, "stored in one of .* got .* 'U8'; use an unquantised checkpoint"),
        ({"shape": [200, 31]}, "the file is truncated or damaged"),
        ({"shape": [200, -32]}, "as whole numbers"),
        ({"shape": [6400]}, r"\(200, 32\), got \(6400, 1\)"),
        ({"shape": [0, 32], "data_offsets": [0, 0]}, "without overlap or hole"),
        ({"shape": "huge"}, "as whole numbers"),
        ({"data_offsets": [0]}, "as whole numbers"),
        ({"data_offsets": [10**15, 10**15 + 25600]}, "truncated or damaged"),
        ({"data_offsets": [25600, 0]}, "truncated or damaged"),
    ],
)
def test_header_entries_that_lie(make_lm: MakeLM, change: dict[str, object], message: str) -> None:
    folder, _ = make_lm(tie_word_embeddings=False)
    file = folder / "model.safetensors"
    header, data = header_of(file)
    header["lm_head.weight"].update(change)
    write(file, header, data)
    with pytest.raises(UnembeddingError, match=message):
        open_unembedding(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 10) + b"{not json}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 6) + b"[" * 6,
    ],
)
def test_files_that_are_no_safetensors(make_lm: MakeLM, content: bytes) -> None:
    folder, _ = make_lm()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UnembeddingError):
        open_unembedding(folder)


def test_truncated_file(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(UnembeddingError, match="truncated or damaged"):
        read(open_unembedding(folder))


@pytest.mark.parametrize("shard", ["../lm/model.safetensors", "/etc/passwd", "a\\b", "", 7, ".."])
def test_index_must_name_plain_files(make_lm: MakeLM, shard: object) -> None:
    folder, _ = make_lm()
    shutil.move(folder / "model.safetensors", folder / "other.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnembeddingError, match=r"must be a plain file name|must hold the shard"):
        open_unembedding(folder)


def test_missing_shard(make_lm: MakeLM) -> None:
    folder, _ = make_lm(shards="20KB")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UnembeddingError, match="must hold the shard"):
        open_unembedding(folder)


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (Path("pwned"), "code ran"))


def test_code_in_a_bin_file_never_runs(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = make_lm(torch_bin=True)
    (folder / "pytorch_model.bin").write_bytes(
        pickle.dumps({"lm_head.weight": Payload()}, protocol=2)
    )
    with pytest.raises(UnembeddingError, match="weights_only=True"):
        open_unembedding(folder)
    torch.save({"lm_head.weight": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(UnembeddingError, match="weights_only=True"):
        open_unembedding(folder)
    assert not Path("pwned").exists()


def test_nan_in_a_checkpoint_names_the_token(make_lm: MakeLM) -> None:
    folder, _ = make_lm()
    weights = load_file(folder / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    weights[name][123, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnembeddingError, match="row 123"):
        build_filter(folder, show_progress_bar=False)


# Identity ----------------------------------------------------------------------------------------


def test_identity_never_holds_a_local_path(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--some--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert model_identity(str(snapshot), None) == ("org/some--name", commit)
    assert model_identity(str(tmp_path), None) == (tmp_path.name, None)
    assert model_identity("org/name", commit) == ("org/name", commit)
    assert model_identity(None, None) == (None, None)

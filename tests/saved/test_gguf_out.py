"""GGUF files with a filter baked in, read back by the gguf library and by transformers."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.errors import EmbedFilterError, FormatError, OutputError, UnembeddingError
from st_embfilter.saved.gguf_out import BAND_KEY, DIMENSIONS_KEY, export_gguf
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of_weight
from tests.cli.test_cli import cli
from tests.conftest import FLOAT32, tiny_lm

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EPSILON = 1e-5

#: Names in the format by those of transformers.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, part = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{part}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{part}"


def random_lm(family: str, *, tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **SIZES, tie_word_embeddings=tied, rms_norm_eps=EPSILON, head_dim=16
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def write_gguf(
    path: Path, model: PreTrainedModel, kind: str = "F32", **extra: np.ndarray
) -> dict[str, np.ndarray]:
    """A GGUF file of a model, without the order of rows that rotary embeddings want: these tests
    put the tensors back under their own names."""
    family = model.config.model_type
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    writer.add_name("tiny")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(127)] + ["naïve 東京"])
    writer.add_array("tests.numbers", [3, 1, 2])
    writer.add_float32("tests.number", 0.1)
    tensors = {
        gguf_name(name): value.numpy()
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    } | extra
    stored = gguf.GGMLQuantizationType[kind]
    for name, value in tensors.items():
        if value.ndim == 1 or kind == "F32":
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def read_back(path: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, gguf.GGUFReader]:
    """The model with the tensors of a file, its head untied."""
    reader = gguf.GGUFReader(path)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = AutoConfig.for_model(**(model.config.to_dict() | {"tie_word_embeddings": False}))
    twin = AutoModelForCausalLM.from_config(config).eval()
    state = {name: torch.tensor(stored.pop(gguf_name(name))) for name in twin.state_dict()}
    assert not stored
    twin.load_state_dict(state)
    return twin, reader


def run(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 120, (3, 17), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    return output.logits.double(), output.hidden_states[-1].double()


def value_of(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


# Rounding to 11, and to 7 bits of each of 32 values, in fewer than 400 matrices in a row.
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", FLOAT32), ("f16", 20 * 2.0**-11), ("q8_0", 20 * 2.0**-7)]
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_file_holds_the_same_model_and_its_state_is_the_filter(
    tmp_path: Path, family: str, tied: bool, kind: str, tolerance: float
) -> None:
    model = random_lm(family, tied=tied)
    write_gguf(tmp_path / "in.gguf", model)
    assert export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", keep=0.25, kind=kind) == (
        16,
        64,
    )
    twin, _ = read_back(tmp_path / "out.gguf", model)
    (logits, state), (new_logits, new_state) = run(model), run(twin)
    assert float((new_logits - logits).norm() / logits.norm()) < tolerance

    gain = model.model.norm.weight.detach().double()
    spectrum = spectrum_of_weight(model.lm_head.weight.detach().double() * gain)
    for keep in (1.0, 0.5, 0.25, 5):  # a prefix is the filter of that width
        rows = spectrum.directions[Band("bulk", keep).indices(64)]
        expected = (state / gain) @ rows.T
        found = new_state[..., : len(rows)]
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_metadata_and_tokenizer_stay_byte_for_byte(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", random_lm("llama", tied=True))
    export_gguf(
        tmp_path / "in.gguf",
        tmp_path / "out.gguf",
        pooling="lasttoken",
        keep=10,
        band="offset:3",
        prompt='"{text}" is',
    )
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("in.gguf", "out.gguf"))

    def raw(reader: gguf.GGUFReader) -> dict[str, bytes]:
        return {
            key: b"".join(part.tobytes() for part in field.parts)
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }

    old, new = raw(before), raw(after)
    assert {key for key in old if old[key] != new[key]} == {"general.file_type"}
    assert new.keys() - old.keys() == {
        "llama.pooling_type",
        DIMENSIONS_KEY,
        BAND_KEY,
        "st_embfilter.prompt",
    }
    assert value_of(after, "general.file_type") == 1
    assert value_of(after, "llama.pooling_type") == gguf.PoolingType.LAST
    assert value_of(after, DIMENSIONS_KEY) == 10
    assert value_of(after, BAND_KEY) == "offset:3"
    assert value_of(after, "tokenizer.ggml.tokens")[-1] == "naïve 東京"


def test_first_blocks_stay_float32(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", random_lm("qwen2", tied=True))
    export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", kind="f16", float32_blocks=1)
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors
        if len(tensor.shape) > 1
    }
    assert {kind for name, kind in kinds.items() if name.startswith("blk.0.")} == {"F32"}
    assert {kind for name, kind in kinds.items() if not name.startswith("blk.0.")} == {"F16"}
    with pytest.raises(FormatError, match="float32_blocks must be 0 or more, got -1"):
        export_gguf(tmp_path / "in.gguf", tmp_path / "x.gguf", float32_blocks=-1)


@pytest.mark.parametrize(
    ("family", "pooling", "told"),
    [("qwen2", "lasttoken", True), ("qwen2", "mean", False), ("llama", "lasttoken", False)],
)
def test_a_last_token_over_keys_with_biases_wants_a_wide_cache(
    tmp_path: Path, family: str, pooling: str, told: bool
) -> None:
    write_gguf(tmp_path / "in.gguf", random_lm(family, tied=True))
    options = [tmp_path / "in.gguf", "--gguf", tmp_path / "out.gguf", "--pooling", pooling]
    result = cli("export", *options)
    assert result.exit_code == 0
    assert ("--cache-type-k f32 --cache-type-v f32 --flash-attn off" in result.output) == told


def test_every_direction_of_an_offset_band_is_there(tmp_path: Path) -> None:
    model = random_lm("llama", tied=True)
    write_gguf(tmp_path / "in.gguf", model)
    export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", keep=10, band="offset:3", kind="f32")
    twin, _ = read_back(tmp_path / "out.gguf", model)
    state, rotated = run(model)[1], run(twin)[1]
    gain = model.model.norm.weight.detach().double()
    assert torch.allclose(rotated.norm(dim=-1), (state / gain).norm(dim=-1), rtol=10 * FLOAT32)
    rows = spectrum_of_weight(model.lm_head.weight.detach().double() * gain).directions[3:13]
    expected = (state / gain) @ rows.T
    assert float((rotated[..., :10] - expected).norm() / expected.norm()) < FLOAT32


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "F16"])
def test_quantised_files_are_read(tmp_path: Path, kind: str) -> None:
    model = random_lm("qwen2", tied=False)
    write_gguf(tmp_path / "in.gguf", model, kind)
    quantised, _ = read_back(tmp_path / "in.gguf", model)
    export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", kind="f32")
    baked, reader = read_back(tmp_path / "out.gguf", model)
    before, after = run(quantised)[0], run(baked)[0]
    assert float((after - before).norm() / before.norm()) < FLOAT32
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"blk.0.post_attention_norm.weight": np.ones(64)}, "a post-norm"),
        ({"blk.1.attn_norm.bias": np.ones(64)}, "LayerNorm"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}, "mixture of experts"),
        ({"position_embd.weight": np.ones((16, 64))}, "position_embd.weight"),
    ],
)
def test_other_architectures_are_refused_with_the_reason(
    tmp_path: Path, tensors: dict[str, np.ndarray], reason: str
) -> None:
    extra = {name: value.astype(np.float32) for name, value in tensors.items()}
    write_gguf(tmp_path / "in.gguf", random_lm("llama", tied=True), **extra)
    with pytest.raises(UnembeddingError, match=reason):
        export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in.gguf"]


def test_parallel_blocks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a norm of its own, the feed-forward part reads that of attention."""
    monkeypatch.setitem(NAMES, "post_attention_layernorm", "attn_out_norm")
    write_gguf(tmp_path / "in.gguf", random_lm("llama", tied=True))
    with pytest.raises(UnembeddingError, match="parallel blocks"):
        export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf")


def test_a_filter_is_baked_once_and_a_zero_gain_cannot_be(tmp_path: Path) -> None:
    model = random_lm("llama", tied=True)
    write_gguf(tmp_path / "in.gguf", model)
    export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf")
    with pytest.raises(UnembeddingError, match="a file with a filter in it"):
        export_gguf(tmp_path / "out.gguf", tmp_path / "again.gguf")
    with torch.no_grad():
        model.model.norm.weight[7] = 0.0
    write_gguf(tmp_path / "zero.gguf", model)
    with pytest.raises(UnembeddingError, match=r"not zero to be folded, got 1 .* first at 7"):
        export_gguf(tmp_path / "zero.gguf", tmp_path / "again.gguf")


def test_the_output_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "in.gguf", tmp_path / "out.gguf"
    write_gguf(source, random_lm("llama", tied=True))
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="not there yet"):
        export_gguf(source, target)
    with pytest.raises(OutputError, match="must not be the input"):
        export_gguf(source, source, overwrite=True)
    with pytest.raises(FormatError, match=r"llama\.cpp pools by"):
        export_gguf(source, target, overwrite=True, pooling="max")
    with pytest.raises(EmbedFilterError):
        export_gguf(tmp_path / "none.gguf", target, overwrite=True)
    assert target.read_bytes() == b"mine"
    export_gguf(source, target, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_filter_of_another_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", random_lm("llama", tied=True))
    other = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0][:16]
    with pytest.raises(UnembeddingError, match="of the model that the filter was made from"):
        export_gguf(tmp_path / "in.gguf", tmp_path / "out.gguf", keep=16, like=other)


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    """By the command, before anything of it is computed."""
    tiny_lm(tmp_path / "lm", tie_word_embeddings=False)
    model = st_embfilter.from_causal_lm(
        tmp_path / "lm", norm="folded", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, tmp_path / "saved")
    write_gguf(tmp_path / "other.gguf", random_lm("llama", tied=True))
    out, other = tmp_path / "out.gguf", tmp_path / "other.gguf"
    command = ["export", str(saved), "--gguf", str(out), "--weights", str(other)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "32 wide, got one 64 wide" in " ".join(result.output.split())
    assert list(tmp_path.glob("*out.gguf*")) == []


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from st_embfilter.saved.gguf_out import export_gguf

torch.set_num_threads(1)
export_gguf(sys.argv[1], sys.argv[3], kind=sys.argv[5])  # whatever is loaded late is loaded now
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = data + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
export_gguf(sys.argv[2], sys.argv[3], kind=sys.argv[5], overwrite=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(("share", "fits"), [(2.0, True), (0.2, False)])
def test_memory_stays_below_two_of_the_largest_tensor(
    tmp_path: Path, share: float, fits: bool
) -> None:
    write_gguf(tmp_path / "small.gguf", random_lm("llama", tied=True))
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 512, "vocab_size": 65_536, "num_hidden_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "num_hidden_layers", 1)
        config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
        write_gguf(tmp_path / "large.gguf", AutoModelForCausalLM.from_config(config))
    largest = 512 * 65_536 * 2  # as it is stored in the output
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / f"{n}.gguf") for n in (
        "small", "large", "out"
    )), str(int(share * largest)), "f16"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr

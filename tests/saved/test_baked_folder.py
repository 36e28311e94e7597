"""A filtered model baked into plain weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.errors import FormatError, OutputError, UnembeddingError
from st_embfilter.saved.baked_folder import bakeable, export_folder
from st_embfilter.saved.verify import verify
from st_embfilter.unembedding.source import Source
from tests import gguf_files
from tests.conftest import FLOAT32, TEXTS, MakeLM
from tests.saved.test_gguf_out import random_lm, value_of, write_gguf

TEXTS_IN = [text for text in TEXTS if text]


def filtered(make_lm: MakeLM, family: str = "llama", **options: object) -> tuple[Path, Path]:
    """A language model with gains that matter, and its filtered folder."""
    folder, model = make_lm(family, vocab_size=256)  # Qwen's tokenizer adds a padding token
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    built = st_embfilter.from_causal_lm(
        folder, device="cpu", show_progress_bar=False, **({"norm": "folded"} | options)
    )
    return folder, st_embfilter.save_pretrained(built, folder.with_name(f"{folder.name}-filtered"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_prefix_is_the_filter_in_plain_sentence_transformers(
    make_lm: MakeLM, tmp_path: Path, family: str
) -> None:
    lm, folder = filtered(make_lm, family, keep=0.75, pooling="lasttoken")
    assert export_folder(folder, tmp_path / "baked") == (24, 32)
    baked = SentenceTransformer(str(tmp_path / "baked"), device="cpu")
    assert [type(module).__name__ for module in baked] == ["Transformer", "Pooling"]
    expected = st_embfilter.load(folder, device="cpu").encode(TEXTS_IN)
    found = baked.encode(TEXTS_IN)
    assert found.shape == (len(TEXTS_IN), 32)
    assert float(np.linalg.norm(found[:, :24] - expected) / np.linalg.norm(expected)) < FLOAT32

    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path)(tokens).logits
            for path in (lm, tmp_path / "baked")
        )
    assert float((after - before).norm() / before.norm()) < FLOAT32


def test_dtype_and_what_servers_read(make_lm: MakeLM, tmp_path: Path) -> None:
    _, folder = filtered(make_lm, normalize=True)
    export_folder(folder, tmp_path / "baked", dtype=torch.float16)
    config = json.loads((tmp_path / "baked" / "config.json").read_bytes())
    assert (config["is_matryoshka"], config["tie_word_embeddings"]) == (True, False)
    baked = SentenceTransformer(str(tmp_path / "baked"), device="cpu")
    assert next(baked.parameters()).dtype == torch.float16
    assert [type(module).__name__ for module in baked] == ["Transformer", "Pooling", "Normalize"]
    assert np.allclose(np.linalg.norm(baked.encode(TEXTS_IN), axis=1), 1.0, atol=20 * 2.0**-11)
    with pytest.raises(OutputError):
        export_folder(folder, tmp_path / "baked")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": None}, "--norm folded"),
        ({"calibrate": [f"{text} {i}" for text in TEXTS_IN for i in range(20)]}, "calibrated"),
        ({"prompt": "echo"}, "the prompt 'echo'"),
    ],
)
def test_what_is_no_rotation_is_refused(
    make_lm: MakeLM, tmp_path: Path, options: dict[str, object], reason: str
) -> None:
    _, folder = filtered(make_lm, **options)
    with pytest.raises(FormatError, match=reason):
        export_folder(folder, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_streams_that_cannot_be_rotated_are_refused(make_lm: MakeLM, tmp_path: Path) -> None:
    lm, _ = make_lm("gpt2")
    with pytest.raises(UnembeddingError, match="subtracts the mean"):
        st_embfilter.build_filter(lm, norm="folded", show_progress_bar=False)


def test_a_folded_filter_reads_the_state_without_its_gain(make_lm: MakeLM) -> None:
    """P diag(1/g), saved and read back; P has the directions of W_U diag(g)."""
    lm, folder = filtered(make_lm, keep=0.5)
    layer = st_embfilter.EmbedFilterLayer.from_pretrained(folder)
    assert layer.metadata.norm == "folded"
    model = AutoModelForCausalLM.from_pretrained(lm)
    gain = model.model.norm.weight.detach().double()
    plain = st_embfilter.build_filter(
        model.lm_head.weight.detach().double() * gain, show_progress_bar=False
    )
    expected = plain.projection.double() / gain
    difference = (layer.projection.double() - expected).norm() / expected.norm()
    assert float(difference) < FLOAT32
    found = bakeable(Source(str(folder)))
    assert (found.pooling, found.template) == ("mean", None)


def test_an_unknown_norm_is_an_error(make_lm: MakeLM, tmp_path: Path) -> None:
    lm, folder = filtered(make_lm)
    with pytest.raises(UnembeddingError, match="norm must be None or 'folded', got 'other'"):
        st_embfilter.build_filter(lm, norm="other", show_progress_bar=False)
    metadata = json.loads((folder / "embfilter.json").read_bytes())
    metadata["filter"]["norm"] = "other"
    (folder / "embfilter.json").write_text(json.dumps(metadata))
    with pytest.raises(FormatError, match=r"filter\.norm must be 'folded' or absent"):
        st_embfilter.EmbedFilterLayer.from_pretrained(folder)


def cli(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return f"{result.exit_code}: {' '.join(result.output.split())}"


def test_export_on_the_command_line(make_lm: MakeLM, tmp_path: Path) -> None:
    import gguf

    lm, _ = make_lm()
    folder, baked = tmp_path / "folded", tmp_path / "baked"
    assert cli("build", lm, "-o", folder, "--norm", "folded", "-q").startswith("0:")
    assert "first 16 are the filter" in cli("export", folder, "--baked", baked, "--type", "bf16")
    assert SentenceTransformer(str(baked), device="cpu").encode("a").shape == (32,)

    model = random_lm("llama", tied=True)
    write_gguf(tmp_path / "in.gguf", model)
    told = cli("export", tmp_path / "in.gguf", "--gguf", tmp_path / "a.gguf", "--keep", "1/4")
    assert told.startswith("0:")
    assert "embeddings of 64 numbers, of which the first 16" in told

    model.save_pretrained(tmp_path / "same")
    source = Path(lm)
    for file in source.glob("*token*"):
        (tmp_path / "same" / file.name).write_bytes(file.read_bytes())
    arguments = ("--norm", "folded", "--prompt", 'In a word, "{text}" is "', "--keep", "20", "-q")
    assert cli("build", tmp_path / "same", "-o", tmp_path / "eol", *arguments).startswith("0:")
    out = tmp_path / "b.gguf"
    told = cli("export", tmp_path / "eol", "--gguf", out, "--weights", tmp_path / "in.gguf")
    assert "the first 20" in told
    reader = gguf.GGUFReader(out)
    assert value_of(reader, "llama.pooling_type") == gguf.PoolingType.LAST
    assert value_of(reader, "st_embfilter.prompt") == 'In a word, "{text}" is "'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --gguf, --baked, --onnx, got 0"),
        (("--gguf", "a", "--baked", "b"), "got 2"),
        (("--baked", "b", "--keep", "0.5"), "--keep must come with a GGUF source"),
        (("--baked", "b", "--weights", "c"), "--weights must come with"),
        (("--baked", "b", "--type", "q8_0"), "--type of a folder must be f32, f16, bf16"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], message: str) -> None:
    told = cli("export", "somewhere", *arguments).replace("│ ", "").replace(" │", "")
    assert told.startswith("2:")
    assert message in told


def test_verify_takes_the_gain_from_the_model(make_lm: MakeLM) -> None:
    _, folder = filtered(make_lm)
    checks = verify(folder, rebuild=True, show_progress_bar=False)
    assert {check.passed for check in checks} == {True}
    assert "rows" in {check.name for check in checks}
    # With another gain the rows are not orthonormal.
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight") and "layers" not in name)
    weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = {check.name: check.passed for check in verify(folder, show_progress_bar=False)}
    assert found["rows"] is False


def test_a_gguf_model_is_filtered_with_its_gain(tmp_path: Path) -> None:
    model = random_lm("llama", tied=True)
    write_gguf(tmp_path / "in.gguf", model)
    layer = st_embfilter.build_filter(tmp_path / "in.gguf", norm="folded", show_progress_bar=False)
    model.save_pretrained(tmp_path / "same")
    expected = st_embfilter.build_filter(tmp_path / "same", norm="folded", show_progress_bar=False)
    assert torch.allclose(layer.projection, expected.projection, rtol=0, atol=FLOAT32)


def test_from_causal_lm_folds_the_norm_of_a_gguf_file(tmp_path: Path) -> None:
    gguf_files.write_gguf(tmp_path / "lm.gguf", gguf_files.tiny_model())
    model = st_embfilter.from_causal_lm(
        tmp_path / "lm.gguf", norm="folded", device="cpu", show_progress_bar=False
    )
    assert model[2].metadata.norm == "folded"


MEMORY = """
import resource, sys
import torch
from st_embfilter.saved.baked_folder import export_folder

torch.set_num_threads(1)
export_folder(sys.argv[1], sys.argv[3])  # whatever is loaded late is loaded now
data = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
limit = data + int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
export_folder(sys.argv[2], sys.argv[3], overwrite=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(("share", "fits"), [(2.0, True), (0.2, False)])
def test_memory_stays_below_two_of_the_largest_tensor(
    make_lm: MakeLM, tmp_path: Path, share: float, fits: bool
) -> None:
    """Of a deep model in 16 bits: what is held for each of its matrices would add up."""
    _, small = filtered(make_lm)
    wide = {"hidden_size": 512, "vocab_size": 65_536, "num_hidden_layers": 24}
    lm, _ = make_lm(name="large", dtype=torch.bfloat16, **wide)
    built = st_embfilter.from_causal_lm(lm, norm="folded", device="cpu", show_progress_bar=False)
    large = st_embfilter.save_pretrained(built, tmp_path / "large-filtered")
    largest = 512 * 65_536 * 2
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path / "out"),
               str(int(share * largest))]  # fmt: skip
    # What is freed goes back to the system at once, whatever its size.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert (done.returncode == 0) == fits, done.stderr

"""One graph says what the model says, and says by how much it does not."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
from tokenizers import Tokenizer

import st_embfilter
from st_embfilter.errors import FormatError, MissingPackageError, OutputError
from st_embfilter.model.layer import filter_of
from st_embfilter.saved import onnx_file, onnx_graph, onnx_out
from st_embfilter.saved.onnx_out import DIMENSIONS_KEY, FILTER_KEY, _batches, _loss
from tests.cli.test_cli import cli, text
from tests.conftest import FLOAT32, MakeLM, same

WORDS = [
    "the glacier",
    "tea",
    "a cup of tea , the light of a glacier in sugar .",
    " ".join(f"w{i * i % 180}" for i in range(90)),
]


needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs the extra onnx",
)


def run(folder: Path, file: str, texts: list[str]) -> np.ndarray:
    """Embeddings as fastembed computes them: the folder alone, padded batches."""
    import onnxruntime

    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(config["model_max_length"])
    pad = json.loads((folder / "config.json").read_text())["pad_token_id"]
    assert tokenizer.token_to_id(config["pad_token"]) == pad
    tokenizer.enable_padding(pad_id=pad)
    encoded = tokenizer.encode_batch(texts)
    session = onnxruntime.InferenceSession(folder / file)
    feed = {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }
    return session.run(["sentence_embedding"], feed)[0]


def built(make_lm: MakeLM, family: str = "llama", **options: Any) -> SentenceTransformer:
    layers = {"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}
    folder, _ = make_lm(family, **layers)
    model = st_embfilter.from_causal_lm(folder, device="cpu", show_progress_bar=False, **options)
    if not isinstance(model[0], StaticEmbedding):
        # Of the tiny tokenizer alone, and GPT-2 would add embeddings of its token types.
        model.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return model


@needs_onnx
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_a_graph_of_every_family_gives_the_same_embeddings(
    make_lm: MakeLM, tmp_path: Path, family: str
) -> None:
    model = built(make_lm, family)
    made = st_embfilter.export_onnx(model, tmp_path / "out")
    assert (made.file, made.dimensions, made.max_tokens) == ("onnx/model.onnx", 16, 64)
    assert made.texts > 8
    assert made.difference < FLOAT32
    assert made.cosine > 1 - FLOAT32
    expected = model.encode(WORDS)
    assert same(run(tmp_path / "out", made.file, WORDS), expected)
    for line, alone in zip(WORDS, expected, strict=True):
        assert same(run(tmp_path / "out", made.file, [line])[0], alone)


@needs_onnx
@pytest.mark.parametrize(
    "options",
    [
        {"prompt": '"{text}" is the', "normalize": True},
        {"prompt": "echo"},
        {"calibrate": [f"{word} w{i} w{i * i % 150}" for i in range(40) for word in ("tea", "a")]},
        {"layers": 0, "normalize": True},
        {"dtype": "bfloat16", "pooling": "max"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_prompts_calibration_tables_and_narrow_backbones(
    make_lm: MakeLM, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = built(make_lm, **options)
    before = {name: value.dtype for name, value in model.state_dict().items()}
    made = st_embfilter.export_onnx(model, tmp_path / "out")
    assert {name: value.dtype for name, value in model.state_dict().items()} == before
    assert made.difference < FLOAT32
    wide = model.float() if "dtype" in options else model
    # A table has 16 bits, in which torch also takes the mean; the graph does in 32.
    tolerance = 2**-10 if "layers" in options else FLOAT32
    assert same(run(tmp_path / "out", made.file, WORDS), wide.encode(WORDS), tolerance)
    facts = json.loads((tmp_path / "out" / "embfilter_onnx.json").read_text())
    assert facts["normalized"] == any(isinstance(m, Normalize) for m in model)
    assert facts["difference"] == made.difference
    assert facts["filter"]["filter"]["k"] == 16


@needs_onnx
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("layers", [0, 1])
def test_narrow_weights_lose_what_is_reported(
    make_lm: MakeLM, tmp_path: Path, dtype: Any, layers: int
) -> None:
    model = built(make_lm, layers=layers, dtype="float32")
    made = st_embfilter.export_onnx(model, tmp_path / "out", dtype=dtype)
    assert (
        made.file == {"float16": "onnx/model_fp16.onnx", "int8": "onnx/model_quantized.onnx"}[dtype]
    )
    batches = _batches(made.max_tokens)
    found = np.concatenate([run(tmp_path / "out", made.file, batch) for batch in batches])
    expected = np.concatenate([model.encode(batch) for batch in batches])
    # Both sides are computed again, in float32; and of a vector of d, one number in 8 bits may fall
    # the other way.
    again = 2 * FLOAT32 + (1 / 127 / 32**0.5 if dtype == "int8" and layers else 0.0)
    assert _loss(found, expected) == pytest.approx((made.difference, made.cosine), abs=again)
    assert made.difference > FLOAT32  # something is lost
    if layers == 0:
        # A mean of rows errs no more than a row: half a step of 1/127 of its largest entry, or of
        # 2^-11 of each.
        table = model[0].embedding.weight.detach().numpy()
        step = 2**-11 if dtype == "float16" else 1 / 254
        worst = step * np.abs(table).max() * np.sqrt(table.shape[1])
        assert np.linalg.norm(found - expected, axis=1).max() <= worst * (1 + FLOAT32)
    stored = sum(weight.nbytes for weight in weights(tmp_path / "out" / made.file))
    exact = sum(value.nelement() for value in model.state_dict().values())
    assert stored < exact * {"float16": 2, "int8": 1}[dtype] * 1.5


@needs_onnx
@pytest.mark.parametrize(
    ("operator", "attributes"),
    [("MatMul", {}), ("Gemm", {"transB": 1}), ("Gemm", {}), ("Gemm", {"alpha": 0.5})],
)
@pytest.mark.parametrize("inputs", [40, 64])
def test_products_in_8_bits_err_by_half_a_step_of_each_block(
    tmp_path: Path, operator: str, attributes: dict[str, Any], inputs: int
) -> None:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnx_ir import from_proto

    draw = np.random.default_rng(inputs)
    w = draw.standard_normal((inputs, 24)).astype(np.float32)
    x = draw.standard_normal((3, inputs)).astype(np.float32)
    x[:, 1] *= 1000  # as the few large entries of a language model
    bias = draw.standard_normal(24).astype(np.float32)
    held = {"w": w.T.copy() if attributes.get("transB") else w, "bias": bias}
    names = ["x", "w"] if operator == "MatMul" else ["x", "w", "bias"]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 24])],
        [numpy_helper.from_array(held[name], name) for name in names[1:]],
    )
    opset = [helper.make_opsetid("", 20)]
    model = from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    onnx_graph.narrow(model, "int8")
    onnx_file.write(model, tmp_path / "out.onnx", {})
    found = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x})[0]
    expected = x.astype(np.float64) @ w * attributes.get("alpha", 1) + bias * (operator == "Gemm")
    kinds = {weight.dtype for weight in weights(tmp_path / "out.onnx") if weight.ndim > 1}
    if "alpha" in attributes:  # no operator of 8 bits has that
        assert kinds == {np.dtype(np.float32)}
        assert np.abs(found - expected).max() < 2**-24 * inputs * np.abs(x).max() * np.abs(w).max()
        return
    assert np.dtype(np.uint8) in kinds
    error = np.zeros_like(expected)
    for start in range(0, inputs, 32):
        a, b = np.abs(x[:, start : start + 32]), np.abs(w[start : start + 32])
        half = a.max(1, keepdims=True) / 254, b.max(0, keepdims=True) / 254
        error += a.sum(1, keepdims=True) * half[1] + half[0] * b.sum(0, keepdims=True)
        error += len(b) * half[0] * half[1]
    assert (np.abs(found - expected) <= 1.001 * error).all()
    assert np.abs(found - expected).max() > 0


@needs_onnx
def test_all_matrices_of_a_model_have_8_bits(make_lm: MakeLM, tmp_path: Path) -> None:
    for family in ("gpt2", "qwen3"):  # GPT-2 has layers of its own, with biases
        model = built(make_lm, family, dtype="float32")
        made = st_embfilter.export_onnx(model, tmp_path / family, dtype="int8")
        stored = weights(tmp_path / family / made.file)
        wide = [one for one in stored if one.ndim == 2 and one.dtype == np.float32]
        codes = sum(one.size for one in stored if one.itemsize == 1 and one.ndim > 1)
        assert 0 < sum(one.size for one in wide) < codes / 16  # scales


def weights(file: Path) -> list[np.ndarray]:
    import onnx

    return [onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer]


@needs_onnx
def test_the_file_is_a_valid_one_that_states_its_width(make_lm: MakeLM, tmp_path: Path) -> None:
    import onnx

    model = built(make_lm)
    made = st_embfilter.export_onnx(model, tmp_path / "out", opset=18)
    file = tmp_path / "out" / made.file
    onnx.checker.check_model(file, full_check=True)
    stored = onnx.load(file)
    assert stored.opset_import[0].version == made.opset == 18
    facts = {entry.key: entry.value for entry in stored.metadata_props}
    layer = filter_of(model)
    assert layer is not None
    assert facts == {DIMENSIONS_KEY: "16", FILTER_KEY: layer.metadata.to_json()}
    assert [value.name for value in stored.graph.input] == ["input_ids", "attention_mask"]
    dims = stored.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 16]
    tables = [w for w in weights(file) if w.shape == (200, 32)]
    assert np.array_equal(tables[0], model[0].auto_model.embed_tokens.weight.detach().numpy())


@needs_onnx
def test_the_check_finds_the_weights_where_the_file_has_them(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    import onnx

    made = st_embfilter.export_onnx(built(make_lm), tmp_path / "out")
    file = tmp_path / "out" / made.file
    content = onnx_file.without_weights(file)
    found, stored = onnx.ModelProto.FromString(content), onnx.load(file)
    outside = {t.name for t in found.graph.initializer if t.data_location == t.EXTERNAL}
    assert outside == {t.name for t in stored.graph.initializer if len(t.raw_data) > 1024}
    assert len(content) < file.stat().st_size - sum(
        len(t.raw_data) for t in stored.graph.initializer if t.name in outside
    ) + 200 * len(outside)
    onnx.load_external_data_for_model(found, str(file.parent))
    for tensor, expected in zip(found.graph.initializer, stored.graph.initializer, strict=True):
        assert tensor.name == expected.name
        assert np.array_equal(
            onnx.numpy_helper.to_array(tensor), onnx.numpy_helper.to_array(expected)
        )
    del found.graph.initializer[:], stored.graph.initializer[:]
    assert found == stored


@needs_onnx
def test_weights_lie_beside_a_graph_that_cannot_hold_them(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    model = built(make_lm)
    made = st_embfilter.export_onnx(model, tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir())
    assert files == ["model.onnx", "model.onnx_data"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    assert same(run(tmp_path / "out", made.file, WORDS), model.encode(WORDS))
    st_embfilter.export_onnx(model, tmp_path / "small", dtype="int8")
    files = sorted(path.name for path in (tmp_path / "small" / "onnx").iterdir())
    assert files == ["model_quantized.onnx", "model_quantized.onnx_data"]


@needs_onnx
def test_a_wrong_graph_is_refused_and_leaves_nothing(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(make_lm)
    right = onnx_graph.trace

    def wrong(pipeline: onnx_graph.Pipeline, opset: int) -> Any:
        other = st_embfilter.add_filter(
            SentenceTransformer(modules=list(model.children())[:2], device="cpu"),
            keep=0.5,
            band="dominant",
        )
        return right(onnx_graph.Pipeline(other), opset)

    monkeypatch.setattr(onnx_graph, "trace", wrong)
    with pytest.raises(FormatError, match="must give the embeddings of the model, got a diff"):
        st_embfilter.export_onnx(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_what_is_no_number_is_refused() -> None:
    good = np.ones((2, 3), np.float32)
    with pytest.raises(FormatError, match="1 numbers that are not finite"):
        _loss(np.array([[1, np.nan, 1], [1, 1, 1]], np.float32), good)
    with pytest.raises(FormatError, match=r"shape \(2, 3\), got shape \(2, 2\)"):
        _loss(good[:, :2], good)
    assert _loss(good, good) == (0.0, 1.0)
    assert _loss(good, good * [[1], [0]])[0] == float("inf")
    assert _loss(2 * good, good) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "metaeol"}, "got MetaEOL, which reads it in several prompts"),
        ({"prompt": "prompteol", "prompt_encoding": "exact"}, "prompt_encoding='portable'"),
    ],
)
def test_models_that_are_refused(
    make_lm: MakeLM, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = built(make_lm, **options)
    with pytest.raises(FormatError, match=message):
        st_embfilter.export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_things_that_are_refused(make_lm: MakeLM, tmp_path: Path) -> None:
    model = built(make_lm)
    with pytest.raises(FormatError, match="dtype must be one of float32, float16, int8, got 'q4'"):
        st_embfilter.export_onnx(model, tmp_path / "out", dtype="q4")  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OutputError, match="must be missing or empty"):
        st_embfilter.export_onnx(model, tmp_path / "full")
    model[0].tokenizer.padding_side = "right"
    pooling = next(module for module in model if isinstance(module, Pooling))
    pooling.include_prompt = False
    with pytest.raises(FormatError, match="leaves out the prompt"):
        st_embfilter.export_onnx(model, tmp_path / "out")
    pooling.include_prompt = True
    with pytest.raises(FormatError, match="starts with Transformer or StaticEmbedding, got Pool"):
        st_embfilter.export_onnx(SentenceTransformer(modules=[pooling]), tmp_path / "out")


@needs_onnx
def test_a_text_that_is_changed_before_the_tokenizer_is_refused(
    make_lm: MakeLM, tmp_path: Path
) -> None:
    model = built(make_lm)
    model[0].tokenizer.truncation_side = "left"
    with pytest.raises(FormatError, match="must give the ids that the model reads"):
        st_embfilter.export_onnx(model, tmp_path / "out")


def test_refused_without_the_packages(
    make_lm: MakeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, sys.modules[__name__])
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime: pip install 'st-emb"):
        st_embfilter.export_onnx(built(make_lm), tmp_path / "out")


@needs_onnx
def test_the_command_line(make_lm: MakeLM, tmp_path: Path) -> None:
    saved = st_embfilter.save_pretrained(built(make_lm, prompt="echo"), tmp_path / "saved")
    target = tmp_path / "out"
    command = ("export", saved, "--onnx", target, "--type", "int8", "--trust-remote-code")
    done = cli(*command)
    assert done.exit_code == 0, done.output
    facts = json.loads((target / "embfilter_onnx.json").read_text())
    assert f"lowest cosine {facts['cosine']:.6f}" in text(done)
    assert (target / "onnx" / "model_quantized.onnx").is_file()
    again = cli(*command)
    assert again.exit_code == 1
    assert "missing or empty" in text(again)
    assert cli(*command, "--overwrite").exit_code == 0
    for wrong in (("--type", "q8_0"), ("--baked", tmp_path / "b")):
        assert cli("export", saved, "--onnx", target, *wrong).exit_code == 2
    assert cli("export", saved, "--gguf", target, "--trust-remote-code").exit_code == 2


def test_texts_of_the_check_reach_the_limit() -> None:
    batches = _batches(None)
    assert [len(batch) for batch in batches[:-1]] == [1] * (len(batches) - 1)
    assert len(batches[-1]) == 5
    assert len(batches[0][0].split()) == 1
    assert len(batches[-2][0].split()) >= onnx_out._LONGEST_CHECK
    assert max(len(batch[0].split()) for batch in _batches(64)) < 128

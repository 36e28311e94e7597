"""`backend="onnx"` and `"openvino"` give the embeddings of torch; skipped where they are not."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import st_embfilter
from compat.export import FILES, export
from tests.conftest import TEXTS, MakeLM

PACKAGES = {"onnx": "optimum.onnxruntime", "openvino": "optimum.intel.openvino"}
OPTIONS = {"onnx": {}, "openvino": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}}

# Tracers warn about every branch on a shape, their libraries about each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=sorted(PACKAGES))
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES[request.param])
    importlib.import_module("optimum.exporters.tasks")
    return request.param


def load(folder: Path, backend: str) -> SentenceTransformer:
    options = dict(OPTIONS[backend])
    return SentenceTransformer(str(folder), backend=backend, device="cpu", model_kwargs=options)


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_an_exported_backbone_under_the_filter_gives_the_same_embeddings(
    make_lm: MakeLM, tmp_path: Path, backend: str, model_type: str, pooling: str
) -> None:
    lm, _ = make_lm(model_type)
    model = st_embfilter.from_causal_lm(lm, pooling=pooling, normalize=True, device="cpu")
    # Of the tiny tokenizer alone, and GPT-2 would add embeddings of its token types.
    model.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    texts = [text for text in TEXTS if text]
    expected = model.encode(texts)
    folder = st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert export(backend, folder) == folder / backend / FILES[backend]
    exported = load(folder, backend)
    assert [type(module).__name__ for module in exported][1:] == ["Pooling", "Dense", "Normalize"]
    assert np.abs(exported.encode(texts) - expected).max() <= 1e-4
    alone = np.concatenate([exported.encode([text]) for text in texts])
    assert np.abs(alone - expected).max() <= 1e-4


def test_what_sentence_transformers_exports_by_itself_lacks_positions(
    saved_demo: Path, tmp_path: Path, backend: str
) -> None:
    """The reason for `compat/export.py`; where this fails, it is needed no more."""
    folder = shutil.copytree(saved_demo, tmp_path / "saved")
    texts = [text for text in TEXTS if text]
    if backend == "onnx":
        with pytest.raises(ValueError, match="Input position_ids is required"):
            load(folder, backend).encode(texts)
        return
    found = load(folder, backend).encode(texts)
    expected = SentenceTransformer(str(saved_demo), device="cpu").encode(texts)
    assert not np.allclose(found, expected, atol=1e-2)

"""The portable folder: complete or absent, and read by plain sentence-transformers."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import LayerNorm

import st_embfilter
from st_embfilter.errors import FormatError, OutputError
from tests.conftest import DEMO_LM, TEXTS, MakeLM, same


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_of_the_folder(saved_demo: Path) -> None:
    assert set(tree(saved_demo)) == {
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "embfilter.json",
        "2_Dense/embfilter_spectrum.safetensors",
        "README.md",
    }


def test_backbone_files_are_copied_unchanged(saved_demo: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (saved_demo / name).read_bytes() == (DEMO_LM / name).read_bytes()
    # But for one key, which vLLM wants.
    before = (DEMO_LM / "config.json").read_text().rstrip().removesuffix("\n}")
    assert (saved_demo / "config.json").read_text() == f'{before},\n  "is_matryoshka": true\n}}\n'


def test_projection_and_spectrum_on_disk(saved_demo: Path) -> None:
    projection = load_file(saved_demo / "2_Dense" / "model.safetensors")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in projection.items()} == {
        "linear.weight": (torch.float32, (128, 256))
    }
    spectrum = load_file(saved_demo / "2_Dense/embfilter_spectrum.safetensors")["singular_values"]
    assert spectrum.dtype == torch.float64
    assert (spectrum.diff() <= 0).all()


def test_plain_sentence_transformers_in_a_process_without_us(saved_demo: Path) -> None:
    code = f"""
        import sys, json
        sys.modules["st_embfilter"] = None  # an import of it would fail
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer({str(saved_demo)!r}, device="cpu")
        print(json.dumps(model.encode({TEXTS!r}).tolist()))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    theirs = np.array(json.loads(run.stdout), dtype=np.float32)
    ours = st_embfilter.load(saved_demo, device="cpu").encode(TEXTS)
    assert same(theirs, ours)


def test_a_trained_backbone_is_not_replaced_by_its_source(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    with torch.no_grad():
        model[0].auto_model.layers[1].mlp.down_proj.weight.add_(0.5)
    path = st_embfilter.save_pretrained(model, tmp_path / "trained")
    again = SentenceTransformer(str(path), device="cpu")
    assert same(again.encode(["the light"]), model.encode(["the light"]))


@pytest.mark.parametrize("form", ["shards", "bin"])
def test_other_forms_of_checkpoints(make_lm: MakeLM, tmp_path: Path, form: str) -> None:
    folder, _ = make_lm(shards="20KB" if form == "shards" else "50GB", torch_bin=form == "bin")
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    path = st_embfilter.save_pretrained(model, tmp_path / "saved")
    again = SentenceTransformer(str(path), device="cpu")
    assert same(again.encode(["the light"]), model.encode(["the light"]))


def test_prompts_and_similarity_travel(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    model.prompts, model.default_prompt_name = {"query": "the ", "document": ""}, "query"
    model.similarity_fn_name = "dot"
    again = SentenceTransformer(
        str(st_embfilter.save_pretrained(model, tmp_path / "saved")), device="cpu"
    )
    assert (again.prompts, again.default_prompt_name) == (model.prompts, "query")
    assert again.similarity_fn_name == "dot"


def test_other_pipelines_are_refused(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    model.append(LayerNorm(16))
    with pytest.raises(FormatError, match=r"> EmbedFilterLayer > LayerNorm; .* other pipelines"):
        st_embfilter.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    plain = SentenceTransformer(
        str(st_embfilter.save_pretrained(model, tmp_path / "saved")), device="cpu"
    )
    with pytest.raises(FormatError, match=r"> Dense; .* st_embfilter\.load to be saved again"):
        st_embfilter.save_pretrained(plain, tmp_path / "again")


# The target --------------------------------------------------------------------------------------


def test_an_empty_folder_is_filled(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    (tmp_path / "empty").mkdir()
    st_embfilter.save_pretrained(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "modules.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "lm"]


def test_overwriting_is_asked_for_and_only_models_are(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    model = st_embfilter.from_causal_lm(folder, device="cpu")
    target = st_embfilter.save_pretrained(model, tmp_path / "saved")
    (target / "stale.txt").write_text("old")
    with pytest.raises(OutputError, match="must be missing or empty, got"):
        st_embfilter.save_pretrained(model, target)
    assert (target / "stale.txt").exists()
    st_embfilter.save_pretrained(model, target, overwrite=True)
    assert not (target / "stale.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="only a model folder"):
        st_embfilter.save_pretrained(model, tmp_path / "home", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="must be a folder, got the file"):
        st_embfilter.save_pretrained(model, tmp_path / "file")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"


def test_a_model_is_not_saved_over_its_own_source(make_lm: MakeLM, tmp_path: Path) -> None:
    folder, _ = make_lm()
    target = st_embfilter.save_pretrained(
        st_embfilter.from_causal_lm(folder, device="cpu"), tmp_path / "saved"
    )
    model = st_embfilter.load(target, device="cpu")
    before = tree(target)
    with pytest.raises(OutputError, match="must not be the model's source"):
        st_embfilter.save_pretrained(model, target, overwrite=True)
    assert tree(target) == before

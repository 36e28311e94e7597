"""`verify` against the GGUF file that a model was built from."""

from pathlib import Path
from typing import Any

import pytest

import st_embfilter
from st_embfilter.saved.baked_folder import export_folder
from st_embfilter.saved.verify import verify
from tests.gguf_files import tiny_model, write_gguf

#: Forms of a model, and how each is built.
FORMS: dict[str, dict[str, Any]] = {
    "portable": {},
    "a prompt": {"prompt": "prompteol"},
    "fewer blocks": {"layers": 1},
    "static": {"layers": 0},
    "static, calibrated": {"layers": 0, "calibrate": "generic", "calibration_size": 64},
    "static, folded": {"layers": 0, "norm": "folded"},
    "baked": {"norm": "folded"},
    "alone": {},
    "alone, folded": {"norm": "folded"},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose weights lose digits in 16 bits."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("qwen2", tied=False), "qwen2", kind="Q8_0")


def build(file: Path, target: Path, form: str, **options: Any) -> Path:
    model = st_embfilter.from_causal_lm(
        file, device="cpu", show_progress_bar=False, **FORMS[form], **options
    )
    if form.startswith("alone"):
        model[2].save_pretrained(target)
        return target
    if form == "baked":
        export_folder(st_embfilter.save_pretrained(model, target.with_name("filtered")), target)
        return target
    return st_embfilter.save_pretrained(model, target)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, None) for form in FORMS), *((form, "bfloat16") for form in ("static", "alone"))],
)
def test_a_model_of_a_file_is_that_of_the_file(
    file: Path, tmp_path: Path, form: str, dtype: str | None
) -> None:
    folder = build(file, tmp_path / "saved", form, dtype=dtype)
    found = verify(folder, base=file, rebuild=True, show_progress_bar=False)
    assert {check.passed for check in found} == {True}, found
    assert {check.name for check in found} >= {"unembedding", "rows"}


@pytest.mark.parametrize("form", ["static", "baked", "alone"])
def test_a_model_of_a_file_is_not_that_of_another(file: Path, tmp_path: Path, form: str) -> None:
    folder = build(file, tmp_path / "saved", form)
    model = tiny_model("qwen2", tied=False)
    model.get_output_embeddings().weight.data[3] *= 1.01
    other = write_gguf(tmp_path / "other.gguf", model, "qwen2", kind="Q8_0")
    found = {c.name: c.passed for c in verify(folder, base=other, show_progress_bar=False)}
    assert found["unembedding"] is False


@pytest.mark.parametrize("form", ["static", "alone"])
def test_a_dtype_that_no_build_has_is_a_failed_check(file: Path, tmp_path: Path, form: str) -> None:
    folder = build(file, tmp_path / "saved", form)
    path = next(folder.rglob("embfilter.json"))
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "int8"'))
    found = {c.name: c.passed for c in verify(folder, base=file, show_progress_bar=False)}
    assert found["unembedding"] is False


def test_a_filter_of_the_matrix_alone(tmp_path: Path) -> None:
    """It needs W_U alone, as the one that made it did."""
    file = write_gguf(
        tmp_path / "tiny.gguf",
        tiny_model("qwen2", tied=False),
        "qwen2",
        kind="Q8_0",
        metadata={"tokenizer.ggml.tokens": None},
    )
    st_embfilter.build_filter(file, show_progress_bar=False).save_pretrained(tmp_path / "alone")
    found = verify(tmp_path / "alone", base=file, rebuild=True, show_progress_bar=False)
    assert {check.passed for check in found} == {True}, found

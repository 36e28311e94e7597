"""`verify` finds what is wrong with a saved model, and nothing wrong with a good one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import st_embfilter
from st_embfilter.cli import app
from st_embfilter.saved.verify import verify
from tests.conftest import TEXTS, tiny_lm

PROJECTION = "2_Dense/model.safetensors"


def results(folder: Path, *, rebuild: bool = True) -> dict[str, bool | None]:
    found = verify(folder, rebuild=rebuild, show_progress_bar=False)
    return {check.name: check.passed for check in found}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tiny_lm(folder / "lm")
    model = st_embfilter.from_causal_lm(folder / "lm", device="cpu", show_progress_bar=False)
    return st_embfilter.save_pretrained(model, folder / "saved")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_good_model_passes_every_check(saved: Path) -> None:
    found = results(saved)
    assert len(found) >= 7
    assert set(found.values()) == {True}
    assert "rebuild" not in results(saved, rebuild=False)


def test_a_filter_alone(saved: Path, tmp_path: Path) -> None:
    st_embfilter.load(saved, device="cpu")[2].save_pretrained(tmp_path / "filter")
    assert results(tmp_path / "filter", rebuild=False)["rows"] is True


@pytest.mark.parametrize("band", ["offset:3", "edges", "random:5"])
def test_other_bands(saved: Path, tmp_path: Path, band: str) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm", band=band, keep=12, device="cpu", show_progress_bar=False
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert set(results(path).values()) == {True}


def tampered(copy: Path, rows: list[int]) -> None:
    weights = load_file(copy / PROJECTION)
    weights["linear.weight"] = weights["linear.weight"][rows].contiguous()
    save_file(weights, copy / PROJECTION)


def test_rows_in_another_order(copy: Path) -> None:
    """Orthonormal and of the same space, but no prefix is a filter any more."""
    tampered(copy, list(range(16))[::-1])
    found = results(copy)
    assert found["rows"] is True
    assert found["directions"] is False
    assert found["rebuild"] is False
    assert results(copy, rebuild=False)["directions"] is False


def test_another_space(copy: Path) -> None:
    weights = load_file(copy / PROJECTION)
    noise = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    weights["linear.weight"] = torch.linalg.qr(noise)[0].T.contiguous()
    save_file(weights, copy / PROJECTION)
    found = results(copy)
    assert (found["rows"], found["directions"], found["rebuild"]) == (True, False, False)


def test_a_matrix_that_was_changed(copy: Path) -> None:
    """One value of the unembedding matrix, far too small to move the subspace."""
    weights = load_file(copy / "model.safetensors")
    name = next(key for key in weights if "embed" in key or "head" in key)
    for key in weights:
        if weights[key].shape == weights[name].shape:
            weights[key][0, 0] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    found = results(copy)
    assert found["unembedding"] is False
    assert found["rebuild"] is True


def test_a_hash_of_another_matrix(copy: Path) -> None:
    document = json.loads((copy / "embfilter.json").read_text())
    document["unembedding"]["sha256"] = "0" * 64
    (copy / "embfilter.json").write_text(json.dumps(document))
    assert results(copy)["unembedding"] is False


def test_a_card_without_metadata(copy: Path) -> None:
    (copy / "README.md").write_text("# A model\n")
    assert results(copy, rebuild=False)["card"] is False
    (copy / "README.md").unlink()
    assert results(copy, rebuild=False)["card"] is False


def test_a_dense_that_is_not_linear(copy: Path) -> None:
    config = json.loads((copy / "2_Dense/config.json").read_text())
    del config["activation_function"]
    (copy / "2_Dense/config.json").write_text(json.dumps(config))
    assert results(copy) == {"files": False}


def test_a_calibrated_model(saved: Path, tmp_path: Path) -> None:
    texts = [f"the w{i} of w{i + 1} in tea" for i in range(40)] + TEXTS
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm", calibrate=texts, device="cpu", show_progress_bar=False
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    found = results(path)
    assert (found["rows"], found["rebuild"]) == (True, True)
    assert found["calibration"] is None
    weights = load_file(path / PROJECTION)
    weights["linear.weight"] += 0.01 * weights["linear.weight"].flip(1)
    save_file(weights, path / PROJECTION)
    assert results(path)["rebuild"] is False


def test_a_model_calibrated_with_its_own_texts(saved: Path, tmp_path: Path) -> None:
    model = st_embfilter.from_causal_lm(
        saved.parent / "lm",
        calibrate="self",
        calibration_size=48,
        device="cpu",
        show_progress_bar=False,
    )
    path = st_embfilter.save_pretrained(model, tmp_path / "model")
    assert results(path)["calibration"] is True
    weights = load_file(path / PROJECTION)
    weights["linear.weight"] *= 1.5
    save_file(weights, path / PROJECTION)
    found = results(path)
    assert found["rebuild"] is True  # the space is the same
    assert found["calibration"] is False


def test_command(saved: Path, copy: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(saved), "--rebuild"])
    assert good.exit_code == 0, good.output
    assert "FAILED" not in good.output
    tampered(copy, list(range(16))[::-1])
    bad = CliRunner().invoke(app, ["verify", str(copy)])
    assert bad.exit_code == 1
    assert "FAILED" in bad.output

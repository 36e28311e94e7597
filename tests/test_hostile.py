"""Malformed and malicious models: one clear error, no code run, nothing written, bounded memory."""

import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch

import st_embfilter
from st_embfilter.errors import EmbedFilterError
from tests.conftest import tiny_lm
from tests.hostile import CANARY, CHECKPOINTS, FILTERS, Hostile, attempt

MAX_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny language model, and a filtered model made of it."""
    folder = tmp_path_factory.mktemp("good")
    tiny_lm(folder / "lm", tie_word_embeddings=False)
    model = st_embfilter.from_causal_lm(
        folder / "lm", normalize=True, device="cpu", show_progress_bar=False
    )
    st_embfilter.save_pretrained(model, folder / "saved")
    return {"lm": folder / "lm", "saved": folder / "saved"}


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): (path.is_symlink() or path.is_fifo() or path.is_dir())
        or path.read_bytes()
        for path in folder.rglob("*")
    }


def test_the_table_is_long_enough() -> None:
    names = [case.name for case in CHECKPOINTS + FILTERS]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.filterwarnings("ignore")  # other libraries warn before they fail
@pytest.mark.parametrize("case", CHECKPOINTS + FILTERS, ids=lambda case: case.name)
def test_hostile(
    case: Hostile, good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / "model"
    shutil.copytree(good["lm" if case.how in ("build", "embed") else "saved"], folder)
    case.change(folder)
    before = contents(tmp_path)
    torch.manual_seed(0)
    tracemalloc.start()
    with pytest.raises(EmbedFilterError) as caught:
        attempt(case.how, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert isinstance(caught.value, case.error), message
    assert re.search(case.says, message), message
    assert "\n" not in message.strip(), message
    assert len(message) < 1000, message
    assert not Path(CANARY).exists()
    assert contents(tmp_path) == before
    assert peak < MAX_BYTES

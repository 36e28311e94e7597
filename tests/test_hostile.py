"""Malformed and malicious models: one clear error, no code run, nothing written, bounded memory."""

import re
import tracemalloc
from pathlib import Path

import pytest
import torch

from hardening.guards import GUARDS
from st_embfilter.errors import EmbedFilterError
from tests.conftest import ROOT
from tests.hostile import CANARY, CHECKPOINTS, FILTERS, Hostile, good_models

MAX_BYTES = 64 * 2**20


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_models(tmp_path_factory.mktemp("good"))


def everything(folder: Path) -> dict[str, object]:
    """Also links, pipes and folders, which hostile models hold."""
    return {
        str(path.relative_to(folder)): (path.is_symlink() or path.is_fifo() or path.is_dir())
        or path.read_bytes()
        for path in folder.rglob("*")
    }


def test_the_table_is_long_enough() -> None:
    names = [case.name for case in CHECKPOINTS + FILTERS]
    assert len(set(names)) == len(names) >= 60


def test_every_guard_that_is_broken_for_trial_is_there() -> None:
    """`python -m hardening.mutations` breaks them; here only that its table follows the code."""
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
    for guard in GUARDS:
        assert (ROOT / guard.file).read_text(encoding="utf-8").count(guard.old) == 1, guard.name
        for test in guard.tests:
            file, _, name = test.partition("::")
            written = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {name.partition('[')[0]}(" in written, guard.name


@pytest.mark.filterwarnings("ignore")  # other libraries warn before they fail
@pytest.mark.parametrize("case", CHECKPOINTS + FILTERS, ids=lambda case: case.name)
def test_hostile(
    case: Hostile, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    folder = tmp_path / "model"
    case.spoil(good, folder)
    before = everything(tmp_path)
    torch.manual_seed(0)
    tracemalloc.start()
    with pytest.raises(EmbedFilterError) as caught:
        case.attempt(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert isinstance(caught.value, case.error), message
    assert re.search(case.says, message), message
    assert "\n" not in message.strip(), message
    assert len(message) < 1000, message
    assert not Path(CANARY).exists()
    assert everything(tmp_path) == before
    assert peak < MAX_BYTES

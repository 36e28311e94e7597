"""A folder is the old one or the complete new one, whoever dies and whatever is full."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from st_embfilter.errors import OutputError
from st_embfilter.files import staging as folders
from st_embfilter.files.staging import staged


def save(target: Path, content: str, *, overwrite: bool = True) -> None:
    with staged(target, overwrite=overwrite) as folder:
        for name in ("modules.json", "a", "b"):
            (folder / name).write_text(content)


def state(target: Path) -> set[str]:
    return {file.read_text() for file in target.iterdir()}


KILLED = """
import os, signal, sys
from pathlib import Path
from st_embfilter.files import staging as folders
if sys.argv[2] == "written":
    with folders.staged(sys.argv[1], overwrite=True) as folder:
        (folder / "modules.json").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
folders._exchange = lambda a, b: False
rename, count = Path.rename, [0]
def dies(self, other):
    result = rename(self, other)
    count[0] += 1
    if count[0] == 2:  # the target is away, the new one not there yet
        os.kill(os.getpid(), signal.SIGKILL)
    return result
Path.rename = dies
with folders.staged(sys.argv[1], overwrite=True) as folder:
    (folder / "modules.json").write_text("new")
"""


def killed(target: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert done.returncode == -signal.SIGKILL


def test_leftovers_of_a_killed_process_go_with_the_next_save(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(target, "old")
    killed(target, "written")
    assert state(target) == {"old"}
    assert len(list(tmp_path.iterdir())) == 2
    save(target, "new")
    assert state(target) == {"new"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_target_that_was_moved_away_comes_back(tmp_path: Path) -> None:
    """Where folders cannot be exchanged in one step."""
    target = tmp_path / "model"
    save(target, "old")
    killed(target, "moved")
    assert not target.exists()
    with pytest.raises(RuntimeError), staged(target, overwrite=True):
        raise RuntimeError
    assert state(target) == {"old"}
    assert os.listdir(tmp_path) == ["model"]


def test_the_target_never_vanishes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    save(target, "0")
    seen: list[bool] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append((target / "b").exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(100):
        save(target, str(i))
    done.set()
    watcher.join()
    assert all(seen)


def test_the_work_of_a_living_process_stays(tmp_path: Path) -> None:
    """Two saves to one folder at a time: none cleans the other away."""
    target = tmp_path / "model"

    def both() -> None:
        with staged(target) as folder:
            (folder / "modules.json").write_text("first")
            save(target, "second")
            assert (folder / "modules.json").read_text() == "first"

    with pytest.raises(OutputError, match="must be missing or empty"):
        both()
    assert state(target) == {"second"}


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = [".model.tmp", ".model.backup.old", ".model.Abcdefgh.tmp", ".models.abcdefgh.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    save(tmp_path / "model", "new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model"])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_full_disk_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    target = tmp_path / "model"
    save(target, "old")

    def fails() -> None:
        with staged(target, overwrite=True) as folder:
            (folder / "a").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"cannot write .*model: No space left"):
        fails()
    assert state(target) == {"old"}
    assert os.listdir(tmp_path) == ["model"]
    save(target, "new")
    assert state(target) == {"new"}


def test_processes_that_save_to_one_folder_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "model"
    code = (
        "import sys; from pathlib import Path; from tests.files.test_staging import save\n"
        "for _ in range(60): save(Path(sys.argv[1]), sys.argv[2])"
    )
    save(target, "start")
    workers = [subprocess.Popen([sys.executable, "-c", code, str(target), n]) for n in "ab"]
    while any(worker.poll() is None for worker in workers):
        contents = []
        for name in ("a", "b"):
            contents.append((target / name).read_text())
        assert set(contents) <= {"start", "a", "b"}
        time.sleep(0.01)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(state(target)) == 1
    assert os.listdir(tmp_path) == ["model"]

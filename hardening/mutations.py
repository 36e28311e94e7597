"""Guards against wrong results and hostile files, each broken once: a test must fail for it.

python -m hardening.mutations             # all of them, in a copy of the repository
python -m hardening.mutations link json   # those whose name holds one of the words

A guard that no test misses is no guard. Where the code has changed so that the text to replace is
gone, the run fails, and the entry here must follow the code.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from hardening.guards import GUARDS, Guard

ROOT = Path(__file__).parents[1]

#: As `tests/conftest.py` sets them, before any library is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TERM": "dumb",
    "OMP_NUM_THREADS": "1",
}

#: What most tests import, once for all of them: a fork has it already.
PRELOADED = ("torch", "sentence_transformers", "transformers", "typer.testing")

#: What pytest said last, in the copy.
OUTPUT = "output-of-pytest.txt"

#: Plugins of pytest that are imported already keep their plain assertions.
OPTIONS = ("-q", "-p", "no:cacheprovider", "--tb=short")
OPTIONS += ("-W", "ignore::pytest.PytestAssertRewriteWarning")

#: How a process that ran the tests of a guard ends; no code that anything else ends with.
KILLED, SURVIVED, UNCLEAR = 40, 41, 42
WORDS = {KILLED: "found", SURVIVED: "MISSED", UNCLEAR: "UNCLEAR"}


@dataclass
class Seen:
    """Counts what became of tests; a plugin of pytest."""

    passed: int = 0
    failed: int = 0

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "when", "") == "call":
            self.passed += bool(getattr(report, "passed", False))
            self.failed += bool(getattr(report, "failed", False))


def copied(folder: Path) -> Path:
    """The files of the repository, as they lie here, in a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def ask(place: Path, tests: tuple[str, ...]) -> int:
    """Runs tests in a copy of the repository, in this process, and exits with what came of them."""
    import pytest

    os.chdir(place)
    sys.path[:] = [str(place), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(place)
    sys.dont_write_bytecode = True
    seen = Seen()
    with (place / OUTPUT).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = pytest.main([*OPTIONS, *tests], plugins=[seen])
    if code == pytest.ExitCode.OK and seen.passed:
        return SURVIVED
    return KILLED if code == pytest.ExitCode.TESTS_FAILED and seen.failed else UNCLEAR


def forked(place: Path, tests: tuple[str, ...]) -> int:
    """As `ask`, in a process of its own."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(ask(place, tests))
    )
    process.start()
    process.join()
    return process.exitcode if process.exitcode in WORDS else UNCLEAR


def broken(place: Path, guard: Guard) -> int:
    """What the tests of a guard say without it.

    Raises:
        SystemExit: If its text does not stand in the file, once.
    """
    file = place / guard.file
    whole = file.read_text(encoding="utf-8")
    if whole.count(guard.old) != 1:
        raise SystemExit(
            f"{guard.name}: {guard.file} must hold the text once, got {whole.count(guard.old)} "
            f"times; write the entry anew:\n{guard.old}"
        )
    file.write_text(whole.replace(guard.old, guard.new), encoding="utf-8")
    try:
        return forked(place, guard.tests)
    finally:
        file.write_text(whole, encoding="utf-8")


def results(guards: list[Guard]) -> Iterator[tuple[Guard, int]]:
    """Each guard, and what its tests say without it; first, that they pass with all of them."""
    with tempfile.TemporaryDirectory(prefix="st-embfilter-mutations-") as place:
        folder = copied(Path(place))
        everything = tuple(dict.fromkeys(test for guard in guards for test in guard.tests))
        if forked(folder, everything) != SURVIVED:
            print((folder / OUTPUT).read_text(encoding="utf-8", errors="replace")[-4000:])
            raise SystemExit("the tests of the guards must pass as the code is; see above")
        for guard in guards:
            yield guard, broken(folder, guard)


def main(words: list[str]) -> int:
    """Breaks the guards whose name holds one of the words; all without any."""
    guards = [one for one in GUARDS if not words or any(word in one.name for word in words)]
    os.environ.update(ENVIRONMENT)
    for name in PRELOADED:
        import_module(name)
    bad = 0
    for guard, found in results(guards):
        bad += found != KILLED
        print(f"{WORDS[found]:8} {guard.name} ({guard.file})", flush=True)
    print(f"{len(guards) - bad} of {len(guards)} broken guards were found")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

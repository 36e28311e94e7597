"""The folder of a corpus: shards, the journal of an unfinished run, the manifest of a finished one.

A shard stands for a fixed number of input rows, so its bytes hang on nothing but the inputs and the
settings. It is written under another name and renamed; then the journal gets a line. The names of
everything that is no shard begin with `_`, which readers of Parquet folders pass over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from st_embfilter.corpus.shard import NPY, Settings, Shard
from st_embfilter.errors import CorpusError, OutputError, WorkerError
from st_embfilter.text import read_json, reading

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST: Final = "_manifest.json"
_JOURNAL: Final = "_journal.jsonl"


class Folder:
    """The output of one run: what is finished, and how more is added.

    Args:
        path: The output folder.
        settings: This run's settings.

    Attributes:
        path: The output folder.
        shards: Those that are finished, by number; only while the run is unfinished.
        rows: Vectors in all of a complete folder.
        bad: Rows that gave none, likewise.
        ranges: Smallest and largest value (2, width) float32 of each dimension, for int8.
        complete: Whether nothing is left to do.

    Raises:
        OutputError: If the folder holds something else, or the vectors of other settings, or cannot
            be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Settings) -> None:
        self.path, self.settings = Path(path).absolute(), settings
        self.shards: dict[int, Shard] = {}
        self.rows = self.bad = 0
        self.ranges: NDArray[np.float32] | None = None
        self.complete = False
        self._journal: IO[bytes] | None = None

    @contextmanager
    def opened(self) -> Iterator[Folder]:
        """The folder, made or gone on with, and locked against other processes."""
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                if (self.path / MANIFEST).exists():
                    self._read_manifest()
                    (self.path / _JOURNAL).unlink(missing_ok=True)
                else:
                    self._open_journal()
            except OutputError:
                raise
            except OSError as error:
                raise OutputError(f"cannot write {self.path}: {_reason(error)}") from error
            yield self
        finally:
            if self._journal is not None:
                self._journal.close()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Adds to an error what has become of the work.

        Raises:
            OutputError: For any `OSError`.
            CorpusError: One raised inside, with what has become of the work.
            WorkerError: One raised inside, with what has become of the work.
        """
        try:
            yield
        except (CorpusError, WorkerError, OSError) as error:
            if isinstance(error, OutputError) and " finished shard" in str(error):
                raise  # from an inner block
            count = len(self.shards)
            stay = f"{count} finished shard{' stays' if count == 1 else 's stay'}"
            ours = isinstance(error, CorpusError | WorkerError | OutputError)
            reason = str(error) if ours else f"cannot write {self.path}: {_reason(error)}"
            raise (type(error) if ours else OutputError)(
                f"{reason}; {stay} in {self.path}, and the same command goes on from there"
            ) from error

    def _read_manifest(self) -> None:
        with reading(self.path / MANIFEST, OutputError, "be as it was written"):
            manifest = read_json((self.path / MANIFEST).read_bytes(), MANIFEST, OutputError)
            self._check(manifest["settings"])
            self.rows, self.bad = int(manifest["rows"]), int(manifest["bad"])
        self.complete = True

    def _open_journal(self) -> None:
        path = self.path / _JOURNAL
        others = [p.name for p in self.path.iterdir() if p.name != _JOURNAL]
        if others and not path.exists():
            raise OutputError(
                f"the output folder must be missing, empty or one of this command, got {self.path} "
                f"with {others[0]} in it; choose another"
            )
        self._journal = path.open("a+b")
        if fcntl is not None:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OutputError(
                    f"one process at a time may write {self.path}, and another does"
                ) from error
        self._journal.seek(0)
        content = self._journal.read()
        whole = content.rfind(b"\n") + 1  # a line that was being written is dropped
        self._journal.truncate(whole)
        if not whole:
            self._append({"settings": self.settings.as_json()})
        with reading(path, OutputError, "be as it was written"):
            for number, found in enumerate(content[:whole].splitlines(), 1):
                line = read_json(found, f"{path}, line {number}:", OutputError)
                if number == 1:
                    self._check(line["settings"])
                elif "ranges" in line:
                    self.ranges = np.array(line["ranges"], np.float32)
                else:
                    shard = Shard.of_json(line)
                    if all(self._size(name) == size for name, (size, _) in shard.files.items()):
                        self.shards[shard.number] = shard
        for folder in (self.path, self.path / NPY):
            for left in folder.glob(".shard-*.tmp"):
                left.unlink()

    def _check(self, theirs: Mapping[str, Any]) -> None:
        ours = self.settings.as_json()
        differ = [name for name in ours if ours[name] != theirs.get(name)]
        if differ:
            name = differ[0]
            raise OutputError(
                f"{self.path} holds vectors of another run, which must have the same model and "
                f"settings: {name} was {_short(theirs.get(name))}, is {_short(ours[name])}; choose "
                "another folder"
            )

    def _size(self, name: str) -> int | None:
        with suppress(OSError):
            return (self.path / name).stat().st_size
        return None

    def _append(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None  # noqa: S101
        with self.working():
            self._journal.write(json.dumps(record).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())

    def set_ranges(self, ranges: NDArray[np.float32]) -> None:
        """Fixes what int8 stands for."""
        self.ranges = ranges
        self._append({"ranges": ranges.tolist()})

    def add(self, shard: Shard) -> None:
        """Writes down that a shard is finished."""
        self._append(asdict(shard))
        self.shards[shard.number] = shard

    def finish(self) -> None:
        """Writes the manifest, which says that the folder is complete."""
        shards = [self.shards[number] for number in sorted(self.shards)]
        ranges = None if self.ranges is None else self.ranges.tolist()
        self.rows = sum(shard.rows for shard in shards)
        self.bad = sum(shard.bad for shard in shards)
        manifest = {
            "rows": self.rows,
            "bad": self.bad,
            "settings": self.settings.as_json(),
            "ranges": ranges,
            "shards": [shard.as_json() for shard in shards],
        }
        with self.working():
            name = self.path / f"{MANIFEST}.tmp"
            with name.open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            name.replace(self.path / MANIFEST)
            (self.path / _JOURNAL).unlink()
        self.complete = True


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

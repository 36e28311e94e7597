"""What a corpus costs beside `model.encode`, and how much memory a large file takes.

python -m benchmarks.corpus MODEL [--texts 20000] [--ray]    # ratios of one run
python -m benchmarks.corpus MODEL --texts 7000 --ray --row "the demo LM"  # a row of docs/corpus.md
python -m benchmarks.corpus MODEL --file-gb 10               # resident memory on a generated file
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks.encode import REPOSITORY, texts
from st_embfilter.corpus.work import WINDOW

#: Bytes of each text of the large file; a model with 64 tokens reads the first few hundred.
LONG = 1 << 21

#: The page whose table `--row` writes, and the head of that table.
PAGE = REPOSITORY / "docs" / "corpus.md"
HEADER = """\
| model | texts | `encode`, s | local | Ray | fixed, s | worker | services, of s on the clock |
|-|-:|-:|-:|-:|-:|-:|-:|
"""


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds of cores that this process took, and on the clock."""
    return time.process_time() - start[0], time.perf_counter() - start[1]


class Peak:
    """The largest resident memory while it is entered, looked up a hundred times a second."""

    def __enter__(self) -> Peak:
        self.start = self.bytes = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Below:
    """Seconds of cores that the processes below this one took while it was entered.

    Looked up four times a second, so that the last quarter of a second of each may be missing.

    Attributes:
        seconds: By what they are: workers of Ray, or the rest of a cluster.
    """

    def __enter__(self) -> Below:
        self._taken: dict[tuple[str, int], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(0.25):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has gone
                    kind = "workers" if "".join(process.cmdline()).startswith("ray::") else "rest"
                    times = process.cpu_times()
                    self._taken[kind, process.pid] = times.user + times.system

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = {"workers": 0.0, "rest": 0.0}
        # A process that was idle before it was a worker counts once, as what it was last.
        for pid in {pid for _, pid in self._taken}:
            kind = max(self.seconds, key=lambda kind: self._taken.get((kind, pid), 0.0))
            self.seconds[kind] += self._taken[kind, pid]


def cluster(name: str, file: Path, output: Path) -> dict[str, float]:
    """What the Ray engine takes with one worker and its own cluster: seconds of cores, by place.

    "here" is this process, "clock" is no core.
    """
    import st_embfilter

    start = time.process_time(), time.perf_counter()
    with Below() as below:
        # Shards of a window, the most that any engine sorts together, pad as `encode` does.
        st_embfilter.encode_corpus(
            name, [file], output, engine="ray", shard_rows=WINDOW, show_progress_bar=False
        )
        core, wall = since(start)
    found = {"here": core, **below.seconds, "clock": wall}
    print(f"ray, with the start of its cluster: {found}")
    return found


def ratios(name: str, count: int, repeat: int, ray: bool, row: str | None) -> None:
    """Seconds of `encode` on a list, of the command's function, and of the Ray engine."""
    import st_embfilter
    from st_embfilter.corpus.encoder import open_model
    from st_embfilter.unembedding.source import Source

    model = open_model(Source.of(name))
    sample = texts(count)
    place = Path(tempfile.mkdtemp())
    file, one = place / "texts.jsonl", place / "one.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in sample]
    file.write_text("".join(lines))
    one.write_text(lines[0])
    model.encode_document(sample[:100], show_progress_bar=False)
    seconds: dict[str, list[tuple[float, float]]] = {"encode": [], "corpus": []}
    for turn in range(repeat):
        start = time.process_time(), time.perf_counter()
        expected = model.encode_document(sample, show_progress_bar=False)
        seconds["encode"].append(since(start))
        start = time.process_time(), time.perf_counter()
        done = st_embfilter.encode_corpus(
            model, [file], place / f"local{turn}", show_progress_bar=False
        )
        seconds["corpus"].append(since(start))
    spent = [cluster(name, path, place / path.stem) for path in (file, one) if ray]
    for what, found in zip(("ray", "ray, one text"), spent, strict=False):
        seconds[what] = [(total(found), found["clock"])]
    assert done.rows == len(expected) == count
    base = [min(column) for column in zip(*seconds["encode"], strict=True)]
    for what, runs in seconds.items():
        core, wall = (min(column) for column in zip(*runs, strict=True))
        print(
            f"{what:13} {core:8.2f} s of a core, ratio {core / base[0]:.3f}; "
            f"{wall:8.2f} s on the clock, ratio {wall / base[1]:.3f}"
        )
    if row is not None:
        local = min(core for core, _ in seconds["corpus"])
        write_row(f"| {row} | {count:,} |", base[0], local, spent)
    shutil.rmtree(place)


def total(spent: dict[str, float]) -> float:
    """Seconds of cores of all processes."""
    return spent["here"] + spent["workers"] + spent["rest"]


def write_row(key: str, encode: float, local: float, spent: list[dict[str, float]]) -> None:
    """Writes a row of the table of docs/corpus.md, or that of the same model and texts anew."""
    cells = [f"{encode:.1f}", f"{local / encode:.3f}"]
    if spent:
        more = {what: seconds - spent[1][what] for what, seconds in spent[0].items()}
        polls = (more["here"] + more["rest"]) / more["clock"]
        cells += [f"{total(spent[0]) / encode:.2f}", f"{total(spent[1]):.1f}"]
        cells += [f"{more['workers'] / encode:.2f}", f"{100 * polls:.1f} % of {more['clock']:.0f}"]
    else:
        cells += ["-"] * 4
    before, header, rest = PAGE.read_text("utf-8").partition(HEADER)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), rest.splitlines(True)))
    after = rest[sum(map(len, rows)) :]
    kept = [line for line in rows if not line.startswith(key)]
    kept.append(" ".join([key, *(f"{cell} |" for cell in cells)]) + "\n")
    PAGE.write_text(before + header + "".join(kept) + after, encoding="utf-8")


def memory(name: str, size: float) -> None:
    """Resident memory over a generated Parquet file of that many GB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    import st_embfilter
    from st_embfilter.corpus.encoder import open_model
    from st_embfilter.unembedding.source import Source

    place = Path(tempfile.mkdtemp())
    try:
        file = place / "large.parquet"
        generator = np.random.default_rng(0)
        words = np.array(texts(100))
        pool = " ".join(generator.choice(words, 2 * LONG // 100))
        count = int(size * 1e9 / LONG)
        schema = pa.schema({"text": pa.string()})
        with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
            for first in range(0, count, 32):
                starts = generator.integers(0, len(pool) - LONG, min(32, count - first))
                rows = [f"{first + i} {pool[s : s + LONG]}" for i, s in enumerate(starts)]
                writer.write_table(pa.table({"text": rows}))
                del rows
        model = open_model(Source.of(name))
        model.max_seq_length = 64
        model.encode_document(texts(64), show_progress_bar=False)
        pa.default_memory_pool().release_unused()
        with Peak() as peak:
            start = time.perf_counter()
            done = st_embfilter.encode_corpus(
                model, [file], place / "out", shard_rows=8192, show_progress_bar=False
            )
            spent = time.perf_counter() - start
        print(
            f"{file.stat().st_size / 1e9:.1f} GB, {done.rows:,} texts of {LONG:,} characters, "
            f"{spent:.0f} s: resident {peak.start / 2**20:.0f} MiB with the model, "
            f"{(peak.bytes - peak.start) / 2**20:+.0f} MiB at the peak"
        )
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a sentence-transformers model")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=2, help="best of N runs")
    parser.add_argument("--ray", action="store_true", help="also the Ray engine, one worker")
    parser.add_argument("--row", metavar="NAME", help="write the result to docs/corpus.md as NAME")
    parser.add_argument("--file-gb", type=float, help="measure memory instead")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.file_gb:
        memory(args.model, args.file_gb)
    else:
        ratios(args.model, args.texts, args.repeat, args.ray, args.row)


if __name__ == "__main__":
    main()

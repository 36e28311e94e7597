"""What shallow models cost and give: speed, memory, folder and scores, in one table.

The whole model, the model cut to some blocks, and the table of token embeddings alone, each saved
as a folder at keep 3/4 and loaded with plain sentence-transformers in a process of its own, in
turn. Texts are drawn from the tasks of `benchmarks/depth.py`, whose rows have the scores; the table
is scored here. `benchmarks/encode.py --depths` runs it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import st_embfilter
from benchmarks.depth import ROWS, read_tasks
from benchmarks.static import Ready, texts_of
from st_embfilter.saved.results import read_results

KEEP = 3 / 4
TASKS = ("Paraphrases", "STSBenchmark", "StackOverflow", "Banking77")

#: Loads a folder, encodes texts, prints texts a second and the peak of memory in MB. The seconds
#: are those of the processor, on one thread: a busy machine slows all alike.
WORKER = """
import json, resource, sys, time
from sentence_transformers import SentenceTransformer
folder, file, times = sys.argv[1:]
texts = json.load(open(file)) * int(times)
model = SentenceTransformer(folder, device="cpu")
model.encode(texts[:32])
start = time.process_time()
model.encode(texts, batch_size=32, show_progress_bar=False)
taken = time.process_time() - start
print(len(texts) / taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@dataclass
class Speed:
    """Texts a second (the best run), peak memory and folder size in MB."""

    texts: float = 0.0
    memory: float = 0.0
    folder: float = 0.0


def size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def speeds(folders: dict[int, Path], sample: Path, repeat: int) -> dict[int, Speed]:
    found = {n: Speed(folder=size(folder)) for n, folder in folders.items()}
    for _ in range(repeat):
        for n, folder in folders.items():
            times = "1" if n else "64"  # a table is done with the texts in a blink
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", WORKER, folder, sample, times],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            rate, memory = map(float, done.stdout.split())
            found[n].texts = max(found[n].texts, rate)
            found[n].memory = max(found[n].memory, memory)
    return found


def line(name: str, speed: Speed, first: Speed, scores: dict[str, float]) -> str:
    cells = [f"{100 * scores[task]:.1f}" for task in TASKS]
    return (
        f"{name:18}{speed.texts:10,.1f}{speed.texts / first.texts:9.1f}x{speed.memory:9,.0f}"
        f"{speed.folder:9,.0f}   {'  '.join(f'{cell:>5}' for cell in cells)}"
        f"{100 * sum(scores.values()) / len(scores):7.1f}"
    )


def run(data: Path, path: str, name: str, layers: list[int], texts: int, repeat: int) -> None:
    """Prints the table."""
    tasks = [task for task in read_tasks(data) if task.info.name in TASKS]
    scores: dict[tuple[int, str], dict[str, float]] = {}
    for row in read_results(ROWS):
        whole = row.configuration == "raw" or row.dims == KEEP * row.full_dims
        if (row.model, row.prompt) == (name, None) and row.task in TASKS and whole:
            scores.setdefault((row.layers or 0, row.configuration), {})[row.task] = row.score
    total = max(n for n, _ in scores)
    depths = [total, *layers, 0]
    every = texts_of(tasks)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for n in depths:
            model = st_embfilter.from_causal_lm(
                path, keep=KEEP, layers=n, device="cpu", show_progress_bar=False
            )
            folders[n] = st_embfilter.save_pretrained(model, Path(scratch, str(n)))
        vectors = np.asarray(model.encode(every, show_progress_bar=False))  # of the last, the table
        ready = Ready({text: i for i, text in enumerate(every)}, vectors)
        scores[0, "bulk"] = {task.info.name: task.run(ready).score for task in tasks}
        sample = Path(scratch, "sample.json")
        drawn = random.Random(0).sample(every, texts)
        sample.write_text(json.dumps(drawn), encoding="utf-8")
        found = speeds(folders, sample, repeat)
    print(f"{texts} texts, {sum(len(t.split()) for t in drawn) / texts:.0f} words each on average")
    print("one thread, seconds of the processor; keep 3/4, scores x 100\n")
    head = "  ".join(f"{task[:5]:>5}" for task in TASKS)
    print(f"{'blocks':18}{'texts/s':>10}{'speed-up':>10}{'MB peak':>9}{'MB':>9}   {head}   mean")
    first = found[total]
    print(line(f"{total}, no filter", first, first, scores[total, "raw"]))
    for n in depths:
        name = str(n) if n else "0, a table"
        print(line(name, found[n], first, scores[n, "bulk"]))

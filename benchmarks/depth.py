"""Measures language models at every depth and writes docs/depth.md.

The data are not part of the repository; the folder is that of `benchmarks/results.py`. The large
sets are cut down here: Banking77 to 20 test and 16 training texts of each class, StackOverflow to
150 titles of each class, drawn with `random.Random(0)`.

    python benchmarks/depth.py DATA --model SmolLM2=path/to/folder [--model ...]
        [--recipe plain] [--cache .cache/vectors] [--only-cached]

It can be stopped and started again: texts that are encoded are in the cache, and scores that are
measured in docs/depth.jsonl. Without a model it writes the page from those.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np

from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.bootstrap import Outcome, mean_statistic
from st_embfilter.evaluation.demo import Paraphrases, demo_texts
from st_embfilter.evaluation.depth import CHUNK, DepthStore
from st_embfilter.evaluation.metrics import ndcg_at_k, unit_rows
from st_embfilter.evaluation.sweep import RawModel, raw_model, sweep
from st_embfilter.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    STSTask,
    Task,
    TaskInfo,
)
from st_embfilter.evaluation.vectors import Encoder, Vectors, text_key
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack
from st_embfilter.saved.results import Result, read_results, write_results

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
ROWS = DOCS / "depth.jsonl"
COMMAND = "make depth DATA=..."

RECIPES = ["plain", "prompteol", "echo"]
KEEPS = [3 / 4, 1 / 2, 1 / 4]
CONFIGURATIONS = [Configuration("bulk", keep) for keep in KEEPS]

#: Longest text in tokens; SciFact's abstracts are cut, to encode 5,183 of them in an hour.
LENGTHS = {"SciFact": 128}

T = TypeVar("T")


@dataclass(frozen=True)
class ParaphraseTask:
    """nDCG@10 of finding a paraphrase's two partners among all texts that are left."""

    info: TaskInfo
    data: Paraphrases

    @classmethod
    def read(cls) -> ParaphraseTask:
        info = TaskInfo(
            "Paraphrases", "Retrieval", "paraphrases", "all", "ndcg_at_10", None, "st-embfilter"
        )
        return cls(info, Paraphrases.read(demo_texts()))

    def run(self, encoder: Encoder) -> Outcome:
        data = self.data
        unit = unit_rows(encoder.encode(data.texts))
        itself = np.eye(len(unit), dtype=bool)
        relevant = (data.groups[:, None] == data.groups) & data.is_paraphrase & ~itself
        cosine = np.where(itself, -np.inf, unit @ unit.T)
        asked = data.is_paraphrase
        values = ndcg_at_k(cosine[asked], relevant[asked])
        return Outcome.of(((len(values),), mean_statistic(values)))


def some_of_each(items: Sequence[T], label: Callable[[T], str], count: int) -> list[T]:
    """At most `count` items of each label, in their order; the same ones every time."""
    rng = random.Random(0)
    by_label: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        by_label.setdefault(label(item), []).append(i)
    kept = [
        i
        for name in sorted(by_label)
        for i in rng.sample(by_label[name], min(count, len(by_label[name])))
    ]
    return [items[i] for i in sorted(kept)]


def read_tasks(data: Path) -> list[Task]:
    banking = ClassificationTask.read(data / "banking77", "Banking77")
    overflow = ClusteringTask.read(data / "stackoverflow" / "titles.txt", "StackOverflow")
    return [
        ParaphraseTask.read(),
        STSTask.read(data / "stsb" / "stsb-en-test.csv", "STSBenchmark"),
        replace(
            overflow,
            texts=some_of_each(overflow.texts, lambda item: item[1], 150),
            runs=3,
            size=3000,
        ),
        RetrievalTask.read(data / "scifact", "SciFact"),
        replace(
            banking,
            train=some_of_each(banking.train, lambda item: item[1], 16),
            test=some_of_each(banking.test, lambda item: item[1], 20),
            runs=1,
        ),
    ]


class Asked:
    """An encoder that only notes what a task asks for."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], str]] = []

    def encode(
        self, texts: Sequence[str], *, method: str = "encode", prompt: str | None = None
    ) -> Vectors:
        self.calls.append((list(texts), method))
        return np.random.default_rng(0).standard_normal((len(texts), 8)).astype(np.float32)


def chunks(task: Task) -> Iterator[tuple[list[str], str]]:
    """The chunks of texts that a task has encoded, and by which method."""
    asked = Asked()
    task.run(asked)
    for texts, method in asked.calls:
        unique = sorted(dict.fromkeys(texts), key=len, reverse=True)
        for first in range(0, len(unique), CHUNK):
            yield unique[first : first + CHUNK], method


def open_model(path: str, recipe: str, task: Task) -> RawModel:
    return raw_model(
        path,
        prompt=None if recipe == "plain" else recipe,
        max_seq_length=LENGTHS.get(task.info.name, 512),
        device="cpu",
        show_progress_bar=False,
    )


def depths_of(raw: RawModel, cache: Path) -> DepthStore:
    total = len(block_stack(backbone_model(raw.model))[1])
    return DepthStore(raw.model, range(total + 1), cache=cache)


def is_cached(raw: RawModel, task: Task, cache: Path) -> bool:
    store = depths_of(raw, cache)
    return all(
        store.file(text_key(texts, method), n, "own").is_file()
        for texts, method in chunks(task)
        for n in store.layers
    )


def measure(
    name: str,
    path: str,
    recipe: str,
    tasks: Iterable[Task],
    cache: Path,
    only_cached: bool,
    done: set[tuple[str | None, str | None, str]],
) -> Iterator[list[Result]]:
    raw: RawModel | None = None
    for task in tasks:
        key = (name, None if recipe == "plain" else recipe, task.info.name)
        if key in done:
            continue
        length = LENGTHS.get(task.info.name, 512)
        if raw is None:
            raw = open_model(path, recipe, task)
        raw.model.max_seq_length = length
        if only_cached and not is_cached(raw, task, cache):
            print(f"{name} {recipe} {task.info.name}: not encoded, left out", flush=True)
            continue
        total = len(block_stack(backbone_model(raw.model))[1])
        rows = [
            replace(row, model=name, command=COMMAND)
            for row in sweep(
                raw,
                [task],
                CONFIGURATIONS,
                layers=range(total + 1),
                cache=cache,
                show_progress_bar=False,
            )
        ]
        print(f"{name} {recipe} {task.info.name}: {len(rows)} rows", flush=True)
        yield rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER_OR_HUB_ID")
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "vectors")
    parser.add_argument("--only-cached", action="store_true", help="Encode nothing.")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    rows = read_results(options.rows) if options.rows.is_file() else []
    done = {(row.model, row.prompt, row.task) for row in rows}
    for model in options.model:
        name, _, path = model.partition("=")
        for recipe in options.recipe or RECIPES:
            for more in measure(
                name,
                path,
                recipe,
                read_tasks(options.data),
                options.cache,
                options.only_cached,
                done,
            ):
                rows += more
                write_results(rows, options.rows)
    write_page(rows)


def write_page(rows: Sequence[Result]) -> None:
    print(version("st-embfilter"), len(rows))


if __name__ == "__main__":
    main()

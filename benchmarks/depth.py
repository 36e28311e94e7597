"""Measures language models at every depth and writes docs/depth.md.

The data are not part of the repository; the folder is that of `benchmarks/results.py`. The large
sets are cut down here: Banking77 to 20 test and 16 training texts of each class, StackOverflow to
150 titles of each class, SciFact to 1,500 documents, those that are judged among them; drawn with
`random.Random(0)`.

    python benchmarks/depth.py DATA --model SmolLM2=path/to/folder [--model ...]
        [--recipe plain] [--cache .cache/vectors] [--only-cached]

It can be stopped and started again: texts that are encoded are in the cache, and scores that are
measured in docs/depth.jsonl. Without a model it writes the page from those.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.bootstrap import Outcome, mean_statistic
from st_embfilter.evaluation.demo import Paraphrases, demo_texts
from st_embfilter.evaluation.depth import CHUNK, DepthStore
from st_embfilter.evaluation.figures import depth_figure
from st_embfilter.evaluation.metrics import ndcg_at_k
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
from st_embfilter.lens.figures import new_figure, save_figure
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack
from st_embfilter.saved.results import Result, read_results, write_results
from st_embfilter.spectrum.unit import unit_rows

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
ROWS = DOCS / "depth.jsonl"
STATIC = DOCS / "static.jsonl"
COMMAND = "make depth DATA=..."

RECIPES = ["plain", "prompteol", "echo"]
KEEPS = [3 / 4, 1 / 2, 1 / 4]
CONFIGURATIONS = [Configuration("bulk", keep) for keep in KEEPS]

TASKS = ["Paraphrases", "STSBenchmark", "StackOverflow", "Banking77", "SciFact"]

#: Longest text in tokens; SciFact's abstracts are cut, to encode nine times 1,500 in an hour.
LENGTHS = {"SciFact": 128}
DOCUMENTS = 1500

TITLES = {"plain": "Mean pooling", "prompteol": "PromptEOL", "echo": "ECHO"}

PAGE_HEAD = """# Depth

Written by `benchmarks/depth.py`; rows with their intervals are in `depth.jsonl`. Each cell is the
score x 100 of the model cut to that many blocks, then its final norm: raw / keep 3/4 / 1/2 / 1/4
(`bulk`). Paraphrases: nDCG@10 of the project's demo texts, which avoid each other's words;
STSBenchmark: Spearman, test pairs; Banking77: accuracy, one draw of 8 examples a class, 20 test
texts a class; StackOverflow: v-measure, 3 samples of 3,000 of 3,000 titles, 150 a class; SciFact:
nDCG@10 of 300 queries among 1,500 abstracts cut at 128 tokens. What is not in a table has not been
measured. The models are dequantised GGUF files, computed in float32; in bfloat16, which the
processor is faster at: Qwen with PromptEOL (but for the paraphrases), ECHO and, on StackOverflow,
mean pooling, Gemma with ECHO, all of them on SciFact. In the figures lines are keep 3/4 and dashes
are raw.

## What holds

- **With mean pooling the last block is hardly ever the best place to stop.** At keep 3/4 the model
  without its last two blocks scores higher than with all of its blocks, by 0.8 to 7.4, on
  paraphrases, STS, StackOverflow and Banking77 of all three models; on SciFact SmolLM2 gains 2.8,
  Gemma and Qwen lose 1.0 and 3.2. The number two was picked on these very data, with nothing held
  out, and some differences are within the intervals; it saves little time.
- **PromptEOL needs all of its blocks, on all three models.** Two blocks fewer cost 1.6 to 3.7 on
  Banking77, 3.9 to 10.9 on StackOverflow and 3.6 to 10.6 on SciFact, and give 1.5 at most
  elsewhere. Half of the blocks is ruin: 4 to 10 on the paraphrases, where all give 62 to 69.
- **ECHO** gains from two blocks fewer on the paraphrases (1.0 to 2.7) and on STS (1.6 to 2.8) on
  all three models; on SciFact and Banking77 it makes no difference of more than 1.0, and on
  StackOverflow it depends on the model (-4.3 to +6.4).
- **Shallow knows topic and wording, with mean pooling.** A fifth to a quarter of the blocks is
  best, or near it, for SmolLM2 on STS, Banking77 and StackOverflow, and for Qwen on STS and
  Banking77. On SciFact, which asks for the words of the query, the token embeddings alone are the
  best of SmolLM2 (48.0, all blocks 34.1) and of Qwen (56.3, 33.9). Gemma is the exception: with
  up to half of its blocks it is worse than with all of them on Banking77, StackOverflow and
  SciFact. So no shallow depth is good for every model, and there is no rule of thumb for one:
  measure yours.
- **Meaning without shared words needs depth.** On the paraphrases a fifth of the blocks keeps 30.2
  of 42.9 (SmolLM2), 29.9 of 49.8 (Qwen) and 15.4 of 57.2 (Gemma), and no block at all 7 to 10.

## No blocks at all

SmolLM2's table of 432 dimensions has the mean 37.6 over the five tasks, its raw table 28.4. It is
above all blocks, raw, on Banking77 (66.2, 54.5), far below them on the paraphrases (8.1, 34.6).
Weights by rank in the vocabulary help without any data, Zipf's (44.2) more than SIF's (42.4).

## Some depths side by side

Keep 3/4 but for the first column of scores.
"""

STATIC_HEAD = """## No blocks at all: static models

Written from `static.jsonl`, which `benchmarks/static.py` measures: tables of token embeddings,
`from_causal_lm(layers=0)`, float32, whole texts. BOS is in no mean, unlike in the row of 0 blocks
above. model2vec 0.10 distils the same language model (`distill_from_model`, its PCA and its SIF
weights) to the same dimensions, with all blocks and with none. It reads each token alone, of which
the last block of a decoder says little: on all three the form without blocks is the stronger rival.
+, -, = say whether the 95 % interval of the difference to the better one of the two, on that task,
excludes zero. Whitening is fitted on 2,000 abstracts of SciFact, which flatters it there alone.
"""

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
        unit = unit_rows(encoder.encode(data.texts).astype(np.float64))
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


def some_documents(task: RetrievalTask, count: int) -> RetrievalTask:
    """A task with the documents that are judged, and others up to a number; the same every time."""
    judged = {name for marks in task.judgements.values() for name in marks}
    others = sorted(set(task.documents) - judged)
    drawn = random.Random(0).sample(others, min(len(others), max(0, count - len(judged))))
    kept = judged | set(drawn)
    return replace(task, documents={k: v for k, v in task.documents.items() if k in kept})


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
        some_documents(RetrievalTask.read(data / "scifact", "SciFact"), DOCUMENTS),
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
            if math.isfinite(row.score)  # PromptEOL's last token says nothing before any block
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


def shown(rows: Sequence[Result]) -> str:
    """Raw and the filter at each width, x 100."""
    by_width = {(row.configuration, row.dims): 100 * row.score for row in rows}
    order = sorted(by_width, key=lambda key: (key[0] != "raw", -key[1]))
    return " / ".join(f"{by_width[key]:.1f}" for key in order)


def curves(rows: Sequence[Result], recipe: str | None, file: Path) -> None:
    """Score against relative depth, one panel for each task; dashed without the filter."""
    tasks = list(dict.fromkeys(row.task for row in rows if row.prompt == recipe))
    models = list(dict.fromkeys(row.model for row in rows if row.prompt == recipe))
    figure, panels = new_figure(3.2 * len(tasks), 3.2, panels=len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("part of the blocks")
        for number, model in enumerate(models):
            here = [
                row for row in rows if (row.task, row.model, row.prompt) == (task, model, recipe)
            ]
            total = max((row.layers or 0 for row in here), default=1)
            for raw in (True, False):
                points = sorted(
                    (row.layers or 0, 100 * row.score)
                    for row in here
                    if (row.configuration == "raw") is raw
                    and (raw or 4 * row.dims == 3 * row.full_dims)
                )
                axes.plot(
                    [x / total for x, _ in points],
                    [y for _, y in points],
                    color=f"C{number}",
                    linestyle="--" if raw else "-",
                    label=None if raw else model,
                )
    panels[0].set_ylabel("score x 100")
    panels[0].legend(fontsize=7)
    save_figure(figure, file)


def summary(rows: Sequence[Result]) -> list[str]:
    """Where the best depth lies, and what some depths give, with 3/4 of the dimensions."""
    lines = ["| model | recipe | task | all, raw | all | two fewer | 1/2 | 1/5 | none | best |"]
    lines += ["|-|-|-|" + "-:|" * 7]
    for model, recipe, task in dict.fromkeys((row.model, row.prompt, row.task) for row in rows):
        here = [row for row in rows if (row.model, row.prompt, row.task) == (model, recipe, task)]
        kept = {
            row.layers or 0: 100 * row.score for row in here if 4 * row.dims == 3 * row.full_dims
        }
        total = max(kept)
        raw = next(100 * r.score for r in here if (r.layers, r.configuration) == (total, "raw"))
        best = max(kept, key=kept.__getitem__)
        depths = (total, total - 2, total // 2, round(total / 5), 0)
        shown = [f"{raw:.1f}", *(f"{kept[n]:.1f}" if n in kept else "" for n in depths)]
        cells = [str(model), TITLES[recipe or "plain"], task, *shown, f"{kept[best]:.1f} at {best}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def in_order(rows: Sequence[Result]) -> list[Result]:
    """By recipe, model and task, however they came to be measured."""
    models = sorted({str(row.model) for row in rows}, key=[str(r.model) for r in rows].index)
    return sorted(
        rows,
        key=lambda row: (
            RECIPES.index(row.prompt or "plain"),
            models.index(str(row.model)),
            TASKS.index(row.task),
        ),
    )


def static_tables() -> list[str]:
    """What `benchmarks/static.py` measured, a table for each model."""
    if not STATIC.is_file():
        return []
    rows = [json.loads(line) for line in STATIC.read_text(encoding="utf-8").splitlines()]
    lines = [STATIC_HEAD]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"### {model}", "", f"| | dimensions | {' | '.join(TASKS)} | mean |"]
        lines += ["|-|" + "-:|" * (len(TASKS) + 2)]
        here = [row for row in rows if row["model"] == model]
        for name, dims in dict.fromkeys((row["name"], row["dims"]) for row in here):
            found = {r["task"]: r for r in here if (r["name"], r["dims"]) == (name, dims)}
            cells = [f"{found[task]['score']:.1f}{_sign(found[task])}" for task in TASKS]
            mean = sum(row["score"] for row in found.values()) / len(found)
            lines.append(f"| {name} | {dims} | {' | '.join(cells)} | {mean:.1f} |")
        lines.append("")
    return lines


def _sign(row: dict[str, Any]) -> str:
    """Whether the interval of the difference to model2vec excludes zero."""
    if row["low"] is None:
        return ""
    return " +" if row["low"] > 0 else " -" if row["high"] < 0 else " ="


def write_page(rows: Sequence[Result]) -> None:
    rows = in_order(rows)
    groups = list(dict.fromkeys((row.model, row.prompt) for row in rows))
    lines = [PAGE_HEAD, *summary(rows), ""]
    for recipe in dict.fromkeys(prompt for _, prompt in groups):
        name = recipe or "plain"
        figure = DOCS / "figures" / f"depth-{name}.png"
        heat = figure.with_stem(f"{figure.stem}-heat")
        curves(rows, recipe, figure)
        save_figure(depth_figure([row for row in rows if row.prompt == recipe]), heat)
        lines += [f"## {TITLES[name]}", "", f"![Score against depth](figures/{figure.name})", ""]
        lines += [f"![Score over depth and dimensions](figures/{heat.name})", ""]
        for model in [m for m, prompt in groups if prompt == recipe]:
            here = [row for row in rows if (row.model, row.prompt) == (model, recipe)]
            tasks = list(dict.fromkeys(row.task for row in here))
            lines += [f"### {model}", "", f"| blocks | {' | '.join(tasks)} |"]
            lines += ["|-:|" + "-|" * len(tasks)]
            for layers in sorted({row.layers or 0 for row in here}, reverse=True):
                cells = [
                    shown([row for row in here if (row.layers, row.task) == (layers, task)])
                    for task in tasks
                ]
                lines.append(f"| {layers} | {' | '.join(cells)} |")
            lines.append("")
    lines += static_tables()
    (DOCS / "depth.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measures the demo LM on four public data sets and writes examples/openstax-lm/results.md.

The data are not part of the repository. The folder that is given must hold

    stsb/stsb-en-dev.csv, stsb/stsb-en-test.csv   STS Benchmark: text, text, score
    scifact/                                       SciFact as a BEIR folder
    banking77/train.csv, banking77/test.csv        Banking77: text, category
    stackoverflow/titles.txt, labels.txt           StackOverflow titles, one a line

    python -m benchmarks.demo_lm DATA [--recipe plain] [--cache .cache/vectors]

Every prompt recipe that the package offers is measured; rows of recipes that are not measured in
this run are taken from the last one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from st_embfilter.evaluation.figures import score_figure, window_figure
from st_embfilter.evaluation.indexes import Collection, StorageRow, storage_table
from st_embfilter.evaluation.search import WindowSearch, search_window
from st_embfilter.evaluation.sweep import default_configurations, raw_model, sweep
from st_embfilter.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    STSTask,
    Task,
)
from st_embfilter.evaluation.vectors import VectorStore
from st_embfilter.lens.figures import save_figure
from st_embfilter.model import prompts
from st_embfilter.model.build import from_causal_lm
from st_embfilter.saved.results import Result, read_results, write_results

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_LM = REPOSITORY / "examples" / "openstax-lm"
ROWS = DEMO_LM / "results.jsonl"
EXTRA = DEMO_LM / "results.json"
PAGE = DEMO_LM / "results.md"
COMMAND = "make results-demo-lm DATA=..."


def recipes() -> list[str]:
    """Plain text, and the recipes that the package offers."""
    return ["plain", *prompts.RECIPES]


def read_tasks(data: Path) -> list[Task]:
    return [
        STSTask.read(data / "stsb" / "stsb-en-test.csv", "STSBenchmark"),
        RetrievalTask.read(data / "scifact", "SciFact"),
        ClassificationTask.read(data / "banking77", "Banking77"),
        ClusteringTask.read(data / "stackoverflow" / "titles.txt", "StackOverflow"),
    ]


def measure(recipe: str, tasks: list[Task], cache: Path) -> Iterator[Result]:
    prompt = None if recipe == "plain" else recipe
    raw = raw_model(DEMO_LM, prompt=prompt, device="cpu")
    for row in sweep(raw, tasks, default_configurations(), cache=cache):
        print(f"{recipe:10} {row.task:14} {row.configuration:16} {row.dims:4} {row.score:.4f}")
        yield replace(row, command=COMMAND)


def search(data: Path, cache: Path) -> WindowSearch:
    development = STSTask.read(data / "stsb" / "stsb-en-dev.csv", "STSBenchmark")
    held_out = STSTask.read(data / "stsb" / "stsb-en-test.csv", "STSBenchmark")
    return search_window(raw_model(DEMO_LM, device="cpu"), [development], [held_out], cache=cache)


def storage(data: Path, cache: Path) -> list[StorageRow]:
    collection = Collection.of_beir(data / "scifact")
    raw = raw_model(DEMO_LM, device="cpu")
    store = VectorStore(raw.model, cache=cache)
    layer = next(
        module
        for module in from_causal_lm(DEMO_LM, keep=1.0, device="cpu").children()
        if hasattr(module, "projection")
    )
    turn = layer.projection.numpy().T
    return storage_table(
        store.encode(collection.documents, method="encode_document") @ turn,
        store.encode(collection.queries, method="encode_query") @ turn,
        gains=collection.gains,
    )


# The page ----------------------------------------------------------------------------------------


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def counted(rows: Sequence[Result]) -> str:
    """How many differences to raw are decided, and how."""
    signs = [row.verdict for row in rows]
    return (
        f"above raw in {signs.count('+')} of {len(signs)} cells, below in {signs.count('-')}, "
        f"undecided in {signs.count('=')}"
    )


def summary(rows: Sequence[Result]) -> Iterator[str]:
    """What holds and what does not, from the rows themselves."""
    bulk = [row for row in rows if row.configuration == "bulk"]
    yield "A cell is one task at one width; it is decided where the 95 % interval of the"
    yield "difference to raw excludes zero.\n"
    yield f"- **The filter** (`bulk`) is {counted(bulk)}."
    for dims in sorted({row.dims for row in bulk}, reverse=True):
        here = [row for row in bulk if row.dims == dims]
        groups = {sign: [row.task for row in here if row.verdict == sign] for sign in "+-="}
        yield (
            f"  - {dims} dimensions: above: {listed(groups['+'])}; below: {listed(groups['-'])}; "
            f"undecided: {listed(groups['='])}."
        )
    for name, meaning in (
        ("truncate", "keeping the first coordinates"),
        ("dominant", "dropping the smallest singular values"),
        ("secondary", "dropping the largest"),
        ("edges", "dropping the middle, which is what the filter keeps"),
        ("random", "random singular directions"),
    ):
        yield f"- `{name}`, {meaning}: {counted([r for r in rows if r.configuration == name])}."
    fitted = [row for row in rows if row.needs_data]
    yield (
        f"- What is **fitted on the task's own texts** (`centre`, `all-but-the-top`, `pca`, "
        f"`whiten`): {counted(fitted)}. These need data, the filter does not."
    )
    cells = {(row.task, row.dims) for row in bulk}
    free = [row for row in rows if not row.needs_data and row.configuration != "raw"]
    best = {
        cell: max((r for r in free if (r.task, r.dims) == cell), key=lambda r: r.score)
        for cell in cells
    }
    won = sum(row.configuration == "bulk" for row in best.values())
    yield (
        f"- Among the configurations of the same width that need no data, `bulk` has the highest "
        f"score in {won} of {len(cells)} cells. That comparison has no interval here."
    )


def score_tables(rows: Sequence[Result]) -> Iterator[str]:
    star = " \\*"
    for task in dict.fromkeys(row.task for row in rows):
        here = [row for row in rows if row.task == task]
        first = here[0]
        kind = {"STS": "pairs", "Retrieval": "queries"}.get(first.task_type, "texts and 10 runs")
        yield (
            f"\n#### {task}\n\n{first.task_type}, {first.split}, `{first.metric}` x 100, "
            f"{first.units:,} resampled {kind}, data `{first.dataset}` {first.revision}.\n"
        )
        yield "| configuration | dims | score | to raw | 95 % interval | |"
        yield "|-|-:|-:|-:|-:|-|"
        for row in here:
            spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
            difference = interval = verdict = ""
            if row.configuration != "raw":
                difference, verdict = f"{100 * row.delta:+.2f}", row.verdict
                interval = f"{100 * row.delta_low:+.2f} to {100 * row.delta_high:+.2f}"
            yield (
                f"| {row.configuration}{star if row.needs_data else ''} | {row.dims} | "
                f"{100 * row.score:.2f}{spread} | {difference} | {interval} | {verdict} |"
            )


def search_lines(found: dict[str, object]) -> Iterator[str]:
    yield "\n## Another window?\n"
    yield (
        "The paper leaves windows that are not symmetric open. `--search` scans offset and width "
        "on development data and judges the best on held-out data: here plain text, STS Benchmark, "
        "development and test part.\n"
    )
    yield f"> {found['warning']}\n"
    yield "| configuration | dims | test score | to raw | 95 % interval |"
    yield "|-|-:|-:|-:|-:|"
    for record in typing.cast("list[dict[str, typing.Any]]", found["held_out"]):
        row = Result(**record)
        delta = "" if row.configuration == "raw" else f"{100 * row.delta:+.2f}"
        interval = (
            ""
            if row.configuration == "raw" or row.delta_low is None or row.delta_high is None
            else f"{100 * row.delta_low:+.2f} to {100 * row.delta_high:+.2f}"
        )
        yield f"| {row.configuration} | {row.dims} | {100 * row.score:.2f} | {delta} | {interval} |"
    yield "\n![Difference to raw over offset and width](results-windows.png)"


def storage_lines(rows: list[dict[str, typing.Any]]) -> Iterator[str]:
    first = StorageRow(**rows[0])
    yield "\n## Storage, speed, quality\n"
    yield (
        f"SciFact: {first.vectors:,} abstracts, plain text, FAISS on one thread. Recall counts the "
        f"neighbours of exact float32 search at {first.dims} dimensions, which is the raw model; "
        "nDCG@10 is against the judgements. Times are of this run on a shared machine.\n"
    )
    yield "| dims | precision | index | MB | ms / query | recall@10 | nDCG@10 |"
    yield "|-:|-|-|-:|-:|-:|-:|"
    for record in rows:
        row = StorageRow(**record)
        yield (
            f"| {row.dims} | {row.precision} | {row.kind} | {row.index_bytes / 1e6:.3f} | "
            f"{row.milliseconds:.3f} | {100 * row.recall:.1f} | {100 * (row.ndcg or 0):.2f} |"
        )


def page(rows: list[Result], extra: dict[str, typing.Any]) -> str:
    lines = [
        "# Results of the demo LM",
        "",
        f"Written by `{COMMAND}`; do not edit. The model is `examples/openstax-lm`: 6.8 million",
        "parameters, 256 dimensions, a seventieth of the smallest model in the paper. What holds",
        "for it may not hold for a large one, and the other way round: measure your own, see",
        "[evaluation.md](../../docs/evaluation.md).",
        "",
        "Scores are computed as MTEB computes them. Intervals are 95 % paired bootstrap intervals",
        f"of the difference to the raw model ({rows[0].resamples:,} samples). `+` above raw, `-`",
        "below, `=` the interval holds zero. `*` needs data: fitted on the task's own texts,",
        "without labels. `random` is the mean over three seeds, ± its standard deviation. Each",
        "interval is for one comparison; of a hundred true zeros some five will look decided.",
        "",
        f"Measured with {extra['versions']}.",
    ]
    for recipe in dict.fromkeys(row.prompt or "plain" for row in rows):
        here = [row for row in rows if (row.prompt or "plain") == recipe]
        title = f"Plain text, {here[0].pooling} pooling" if recipe == "plain" else f"`{recipe}`"
        lines += [f"\n## {title}\n", "### What holds and what does not\n", *summary(here)]
        lines += [f"\n![Score against dimensions](results-{recipe}.png)\n"]
        lines += ["### Every score", *score_tables(here)]
    lines += [*search_lines(extra["search"]), *storage_lines(extra["storage"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--recipe", action="append", choices=recipes())
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "vectors")
    parser.add_argument("--render-only", action="store_true", help="from the last run's figures")
    arguments = parser.parse_args()
    rows = read_results(ROWS) if ROWS.is_file() else []
    if not arguments.render_only:
        tasks = read_tasks(arguments.data)
        for recipe in arguments.recipe or recipes():
            measured = list(measure(recipe, tasks, arguments.cache))
            rows = [row for row in rows if (row.prompt or "plain") != recipe] + measured
            write_results(rows, ROWS)
        found = search(arguments.data, arguments.cache)
        save_figure(window_figure(found.scan), DEMO_LM / "results-windows.png")
        packages = ("st-embfilter", "sentence-transformers", "transformers", "torch", "faiss-cpu")
        names = [f"{name} {version(name)}" for name in packages]
        extra = {
            "versions": f"{', '.join(names)}, Python {platform.python_version()}, "
            f"{os.cpu_count()} CPU cores",
            "search": {
                "warning": found.warning,
                "held_out": [asdict(row) for row in found.held_out],
            },
            "storage": [asdict(row) for row in storage(arguments.data, arguments.cache)],
        }
        EXTRA.write_text(json.dumps(extra, indent=1) + "\n", encoding="utf-8")
    for recipe in dict.fromkeys(row.prompt or "plain" for row in rows):
        here = [row for row in rows if (row.prompt or "plain") == recipe]
        save_figure(score_figure(here), DEMO_LM / f"results-{recipe}.png")
    PAGE.write_text(page(rows, json.loads(EXTRA.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

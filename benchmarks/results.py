"""Measures three real language models and writes docs/results.md.

Every configuration of `st-embfilter eval` at the last layer, for plain text (mean pooling),
PromptEOL and ECHO, on the data and subsets of `benchmarks/depth.py`, from the vectors in the same
cache.

    python -m benchmarks.results DATA [--models smollm2,qwen,gemma] [--recipe plain]
        [--minutes 60] [--cache .cache/vectors] [--only-cached]

A model is a name of `examples/models.py`, which fetches it, or NAME=FOLDER. The command can be
stopped and started again: texts that are encoded are in the cache, scores that are measured in
docs/results.jsonl. With `--minutes 0` it writes the page from those.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.depth import LENGTHS, RECIPES, depths_of, is_cached, open_model, read_tasks
from examples.models import MODELS, fetch
from st_embfilter.evaluation.baselines import grid
from st_embfilter.evaluation.figures import score_figure
from st_embfilter.evaluation.sweep import RawModel, sweep
from st_embfilter.evaluation.tasks import Task
from st_embfilter.lens.figures import save_figure
from st_embfilter.saved.results import Result, read_results, write_results

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
ROWS = DOCS / "results.jsonl"
PAGE = DOCS / "results.md"
COMMAND = "make results DATA=..."

KEEPS = (3 / 4, 1 / 2, 1 / 4, 1 / 8)
NAMES = ("bulk", "secondary", "dominant", "edges", "random", "truncate", "pca", "whiten")
TITLES = {"plain": "mean pooling", "prompteol": "PromptEOL", "echo": "ECHO"}

#: Measured with the weights and the arithmetic in bfloat16, which the processor is faster at; a
#: folder saved in bfloat16 is given as NAME=FOLDER for that. Model, recipe, task or None for all of
#: them; SciFact besides, of every model and recipe.
BFLOAT16 = (
    ("qwen", "prompteol", None),
    ("gemma", "echo", None),
    ("qwen", "echo", None),
    ("qwen", "plain", "StackOverflow"),
)

#: The paper's Qwen2.5-0.5B, arXiv 2606.07502: raw, tau = 2, by recipe and kind of task.
PAPER = {
    ("prompteol", "STS"): (63.04, 69.48),
    ("prompteol", "Classification"): (69.20, 70.32),
    ("prompteol", "Clustering"): (34.91, 39.20),
    ("prompteol", "Retrieval"): (27.31, 34.73),
    ("echo", "STS"): (63.98, 70.77),
    ("echo", "Classification"): (64.86, 67.37),
    ("echo", "Clustering"): (30.16, 36.94),
    ("echo", "Retrieval"): (18.15, 29.65),
}


def title(model: str) -> str:
    return MODELS[model].title.partition(" (")[0]


def recipe_of(row: Result) -> str:
    return row.prompt or "plain"


def measure(raw: RawModel, task: Task, cache: Path) -> list[Result]:
    depths = depths_of(raw, cache)
    rows = sweep(
        raw,
        [task],
        grid(NAMES, KEEPS),
        layers=[depths.layers[0]],
        cache=cache,
        show_progress_bar=False,
    )
    return [replace(row, layers=None, command=COMMAND) for row in rows]


def run(
    models: dict[str, str],
    recipes: Iterable[str],
    tasks: Sequence[Task],
    cache: Path,
    done: set[tuple[str | None, str, str]],
    stop: float,
    only_cached: bool,
) -> Iterator[list[Result]]:
    for recipe in recipes:
        for name, path in models.items():
            raw: RawModel | None = None
            for task in tasks:
                if (name, recipe, task.info.name) in done or time.monotonic() > stop:
                    continue
                raw = raw or open_model(path, recipe, task)
                raw.model.max_seq_length = LENGTHS.get(task.info.name, 512)
                if only_cached and not is_cached(raw, task, cache):
                    print(f"{name} {recipe} {task.info.name}: not encoded, left out", flush=True)
                    continue
                rows = [replace(row, model=name) for row in measure(raw, task, cache)]
                print(f"{name} {recipe} {task.info.name}: {len(rows)} rows", flush=True)
                yield rows


# The page ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A difference to raw, the mean over tasks, with its 95 % interval; all x 100."""

    raw: float
    delta: float
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[Result], raw: Sequence[Result]) -> Mean:
        # Tasks are independent, so the variances of their means add up; an interval is 2 x 1.96
        # standard errors wide.
        spread = [((row.delta_high or 0.0) - (row.delta_low or 0.0)) / (2 * 1.96) for row in rows]
        error = math.sqrt(sum(one * one for one in spread)) / len(rows)
        delta = sum(row.delta for row in rows) / len(rows)
        base = sum(row.score for row in raw) / len(raw)
        return cls(
            100 * base, 100 * delta, 100 * (delta - 1.96 * error), 100 * (delta + 1.96 * error)
        )

    def __str__(self) -> str:
        return f"{self.delta:+.1f} | {self.low:+.1f} to {self.high:+.1f}"


def of(rows: Iterable[Result], configuration: str, share: float | None = None) -> list[Result]:
    """The rows of a configuration, at a share of the dimensions."""
    return [
        row
        for row in rows
        if row.configuration == configuration
        and (share is None or row.dims == math.floor(row.full_dims * share))
    ]


def groups(rows: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for row in rows:
        found.setdefault((str(row.model), recipe_of(row)), []).append(row)
    order = list(MODELS)
    return dict(
        sorted(found.items(), key=lambda item: (order.index(item[0][0]), RECIPES.index(item[0][1])))
    )


def summary(rows: Sequence[Result]) -> Iterator[str]:
    yield "| model | recipe | tasks | raw | best keep | to raw | 95 % interval | 1/2, to raw |"
    yield "|-|-|-:|-:|-|-:|-:|-:|"
    for (model, recipe), here in groups(rows).items():
        raw = of(here, "raw")
        means = {share: Mean.of(of(here, "bulk", share), raw) for share in KEEPS}
        best = max(means, key=lambda share: means[share].delta)
        yield (
            f"| {title(model)} | {TITLES[recipe]} | {len(raw)} | {means[best].raw:.1f} | "
            f"{share_name(best)} | {means[best]} | {means[1 / 2].delta:+.1f} |"
        )


def side_by_side(rows: Sequence[Result]) -> Iterator[str]:
    """Raw and keep 3/4 on the tasks that every model and recipe has."""
    measured = groups(rows)
    shared = set.intersection(*({row.task for row in here} for here in measured.values()))
    recipes = list(dict.fromkeys(recipe for _, recipe in measured))
    models = list(dict.fromkeys(model for model, _ in measured))
    yield f"Raw, and keep 3/4 to it, on the tasks that all have: {', '.join(sorted(shared))}."
    yield ""
    yield "| | " + " | ".join(TITLES[recipe] for recipe in recipes) + " |"
    yield "|-|" + "-:|" * len(recipes)
    for model in models:
        cells = []
        for recipe in recipes:
            here = [row for row in measured.get((model, recipe), []) if row.task in shared]
            mean = Mean.of(of(here, "bulk", 3 / 4), of(here, "raw")) if here else None
            cells.append("" if mean is None else f"{mean.raw:.1f} **{mean.delta:+.1f}**")
        yield f"| {title(model)} | {' | '.join(cells)} |"


def share_name(share: float) -> str:
    numerator, denominator = share.as_integer_ratio()
    return f"{numerator}/{denominator}"


def comparison(rows: Sequence[Result]) -> Iterator[str]:
    """The mean difference to raw of every configuration, and how often it is decided."""
    yield "| configuration | " + " | ".join(map(share_name, KEEPS)) + " | above, below, undecided |"
    yield "|-|" + "-:|" * len(KEEPS) + "-|"
    for name in NAMES:
        cells = []
        for share in KEEPS:
            here = of(rows, name, share)
            mean = sum(row.delta for row in here) / len(here) if here else math.nan
            cells.append(f"{100 * mean:+.1f}")
        verdicts = [row.verdict for row in of(rows, name)]
        counts = ", ".join(str(verdicts.count(sign)) for sign in "+-=")
        star = r" \*" if of(rows, name)[0].needs_data else ""
        yield f"| {name}{star} | {' | '.join(cells)} | {counts} |"


def beside_the_paper(rows: Sequence[Result]) -> Iterator[str]:
    yield "| recipe | kind of task | paper: raw | tau 2 | | here: raw | 1/2 | |"
    yield "|-|-|-:|-:|-:|-:|-:|-:|"
    for (recipe, kind), (raw, filtered) in PAPER.items():
        here = [
            row
            for row in rows
            if row.model == "qwen"
            and recipe_of(row) == recipe
            and row.task_type == kind
            and row.task != "Paraphrases"
        ]
        if not here:
            continue
        first, half = of(here, "raw")[0], of(here, "bulk", 1 / 2)[0]
        ours = f"| {100 * first.score:.1f} | {100 * half.score:.1f} | {100 * half.delta:+.1f} |"
        yield (
            f"| {TITLES[recipe]} | {kind} | {raw:.1f} | {filtered:.1f} | {filtered - raw:+.1f} "
            f"{ours}"
        )


def details(rows: Sequence[Result]) -> Iterator[str]:
    for (model, recipe), here in groups(rows).items():
        yield f"\n### {title(model)}, {TITLES[recipe]}\n"
        for task in dict.fromkeys(row.task for row in here):
            of_task = [row for row in here if row.task == task]
            raw = of(of_task, "raw")[0]
            cut = f", texts cut at {raw.max_seq_length} tokens" if task in LENGTHS else ""
            yield (
                f"\n{task}, `{raw.metric}` x 100{cut}, {raw.units:,} units. Raw, "
                f"{raw.full_dims} dimensions: **{100 * raw.score:.2f}**\n"
            )
            yield "| | " + " | ".join(f"{share_name(s)} | 95 %" for s in KEEPS) + " |"
            yield "|-|" + "-:|-:|" * len(KEEPS)
            for name in NAMES:
                cells = []
                for share in KEEPS:
                    found = of(of_task, name, share)
                    cells.append(cell(found[0]) if found else " | ")
                yield f"| {name} | {' | '.join(cells)} |"


def cell(row: Result) -> str:
    interval = (
        ""
        if row.delta_low is None or row.delta_high is None
        else f"{100 * row.delta_low:+.1f} to {100 * row.delta_high:+.1f}"
    )
    return f"{100 * row.score:.1f} | {interval}"


def page(rows: Sequence[Result]) -> str:
    data = list(dict.fromkeys(row.task for row in rows))
    measured = groups(rows)
    halves = ", ".join(
        f"{title(model)} with {TITLES[recipe]}{f' on {task}' if task else ''}"
        for model, recipe, task in BFLOAT16
        if any(task in (None, row.task) for row in measured.get((model, recipe), []))
    )
    lines = [
        "# Results on real language models",
        "",
        f"Written by `{COMMAND}`; do not edit. Every number comes from `results.jsonl` beside it.",
        "",
        *summary(rows),
        "",
        *side_by_side(rows),
        "",
        "Scores x 100, means over the tasks that were measured: " + ", ".join(data) + ". `best",
        "keep` is the best of four, so luck flatters it a little; the last column is fixed. The",
        "difference of a mean has the interval that follows from those of its tasks, 95 % paired",
        f"bootstrap intervals ({rows[0].resamples:,} samples) in the tables below.",
        "",
        "The models are dequantised GGUF files, see `examples/models.py`, in float32 arithmetic;",
        f"in bfloat16: SciFact, {halves or 'no other'}.",
        "Banking77 is cut to 20 test and 16 training texts a class, StackOverflow to 150 titles a",
        "class, SciFact to 1,500 abstracts of 128 tokens; `Paraphrases` are the project's demo",
        "texts, which avoid each other's words.",
        "[depth.md](depth.md) tells what earlier layers give.",
        "",
        "## What the filter is compared with",
        "",
        "Mean difference to raw over all models, recipes and tasks; the last column counts cells",
        r"whose interval excludes zero. `*` is fitted on the task's own texts, the filter is not.",
        "",
        *comparison(rows),
        "",
        "## Beside the paper",
        "",
        "Only what has been measured here; the command goes on where it was stopped.",
        "The paper's Qwen2.5-0.5B on all MTEB tasks of a kind, and Qwen2.5-Coder-0.5B-Instruct,",
        "quantised to 4 to 8 bits, on one data set of that kind here: sizes of effects compare,",
        "the scores do not.",
        "",
        *beside_the_paper(rows),
        "",
        "## Score against dimensions",
        "",
    ]
    for model in dict.fromkeys(str(row.model) for row in rows):
        lines.append(f"![{title(model)}](figures/results-{model}.png)\n")
    lines += ["## Every score", *details(rows)]
    return "\n".join(lines) + "\n"


def figures(rows: Sequence[Result]) -> None:
    for model in dict.fromkeys(str(row.model) for row in rows):
        here = [row for row in rows if row.model == model]
        recipe = "prompteol" if any(recipe_of(r) == "prompteol" for r in here) else "plain"
        shown = [row for row in here if recipe_of(row) == recipe]
        save_figure(score_figure(shown), DOCS / "figures" / f"results-{model}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--models", default=",".join(MODELS), help="names, or NAME=FOLDER")
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "vectors")
    parser.add_argument("--only-cached", action="store_true", help="encode nothing")
    options = parser.parse_args()
    rows = read_results(ROWS) if ROWS.is_file() else []
    if options.data is not None:
        models = {}
        for model in options.models.split(","):
            name, _, path = model.partition("=")
            models[name] = path or str(fetch(name))
        done = {(row.model, recipe_of(row), row.task) for row in rows}
        stop = time.monotonic() + 60 * options.minutes
        tasks = read_tasks(options.data)
        recipes = options.recipe or RECIPES
        for more in run(models, recipes, tasks, options.cache, done, stop, options.only_cached):
            rows += more
            write_results(rows, ROWS)
    figures(rows)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The folded norm beside the paper's spectrum, a table of docs/llama-cpp.md.

python -m benchmarks.folded DATA --cache FOLDER --model NAME=FOLDER.. [--recipe prompteol]

DATA and the cache are those of `benchmarks/results.py`; nothing is encoded here, so a task that is
not in the cache is left out.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

from benchmarks.depth import LENGTHS, RECIPES, depths_of, is_cached, read_tasks
from benchmarks.results import KEEPS, of
from st_embfilter.evaluation.baselines import grid
from st_embfilter.evaluation.sweep import raw_model, sweep
from st_embfilter.evaluation.tasks import Task

#: What the two ways are called in a sweep.
WAYS = ("bulk", "folded")


def rows(name: str, path: str, recipe: str, tasks: list[Task], cache: Path) -> Iterator[str]:
    """A line for each task: paper / folded, x 100, unfiltered and at every width."""
    raw = raw_model(
        path,
        prompt=None if recipe == "plain" else recipe,
        device="cpu",
        folded=True,
        show_progress_bar=False,
    )
    for task in tasks:
        raw.model.max_seq_length = LENGTHS.get(task.info.name, 512)
        if not is_cached(raw, task, cache):
            continue
        found = list(
            sweep(
                raw,
                [task],
                grid(WAYS, (1.0, *KEEPS)),
                layers=[depths_of(raw, cache).layers[0]],
                cache=cache,
                resamples=0,
                show_progress_bar=False,
            )
        )
        pairs = ([of(found, way, share)[0].score for way in WAYS] for share in (1.0, *KEEPS))
        cells = (f"{100 * paper:.1f} / {100 * folded:.1f}" for paper, folded in pairs)
        prompt = "" if recipe == "plain" else f"{recipe}, "
        yield f"| {name}, {prompt}{task.info.name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--recipe", choices=RECIPES, default="plain")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tasks = read_tasks(args.data)
    for model in args.model:
        for row in rows(*model.split("=", 1), args.recipe, tasks, args.cache):
            print(row, flush=True)


if __name__ == "__main__":
    main()

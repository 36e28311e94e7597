"""Measures static models of language models, beside model2vec's distilled from the same ones.

Every table is one build of `from_causal_lm(layers=0)`; its prefixes are the widths. On the data of
`benchmarks/depth.py`, which writes what is measured here into docs/depth.md.

    python -m benchmarks.static DATA --model NAME=FOLDER [--model ...]
        [--model2vec PYTHON] [--no-blocks] [--states FOLDER]

PYTHON is that of an environment with model2vec; without it model2vec is left out. It distils what
our tables are made of, the token embeddings, and the output of the whole language model for each
token, which takes long; not with --no-blocks. Models that are in docs/static.jsonl are measured
anew and replace their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import st_embfilter
from benchmarks.depth import STATIC, Asked, read_tasks
from st_embfilter.evaluation.bootstrap import Outcome, interval, replicates
from st_embfilter.evaluation.data import read_corpus
from st_embfilter.evaluation.tasks import Task
from st_embfilter.evaluation.vectors import Vectors

REPOSITORY = Path(__file__).resolve().parents[1]

#: Abstracts of SciFact that the whitening is fitted on; of none of the other tasks.
FITTED_ON = 2000

#: model2vec's own default.
DIMS = 256


@dataclass(frozen=True)
class Row:
    """A score x 100, with the 95 % interval of its difference to model2vec at the same width.

    That is the better one of model2vec's two on the task.
    """

    model: str
    name: str
    dims: int
    task: str
    score: float
    delta: float | None = None
    low: float | None = None
    high: float | None = None


class Ready:
    """An encoder that looks vectors up."""

    def __init__(self, place: dict[str, int], vectors: Vectors) -> None:
        self.place, self.vectors = place, vectors

    def encode(
        self, texts: Sequence[str], *, method: str = "encode", prompt: str | None = None
    ) -> Vectors:
        return self.vectors[[self.place[text] for text in texts]]


def texts_of(tasks: Sequence[Task]) -> list[str]:
    asked = Asked()
    for task in tasks:
        task.run(asked)
    return list(dict.fromkeys(text for texts, _ in asked.calls for text in texts))


def distilled(
    python: str, folder: str, texts: list[str], dims: list[int], states: Path, *, whole: bool
) -> dict[int, Vectors]:
    states.mkdir(parents=True, exist_ok=True)
    listed = states / "texts.json"
    listed.write_text(json.dumps(texts), encoding="utf-8")
    widths = [word for k in dims for word in ("--dims", str(k))]
    script = str(REPOSITORY / "benchmarks" / "distill.py")
    blocks = [] if whole else ["--no-blocks"]
    command = [python, "-W", "ignore", script, folder, str(listed), str(states), *widths, *blocks]
    subprocess.run(command, check=True)
    return {k: np.load(states / f"{k}.npy") for k in dims}


def tables(folder: str, fit: list[str], texts: list[str]) -> Iterator[tuple[str, Vectors]]:
    """Every static model by its name, as vectors of all texts in nested order."""
    variants: dict[str, dict[str, object]] = {
        "filter": {},
        "filter, Zipf": {"token_weights": "zipf"},
        "filter, SIF": {"token_weights": "sif"},
        "filter 1/2, whitened": {"keep": 0.5, "calibrate": fit},
        "filter 1/2, whitened, SIF": {"keep": 0.5, "calibrate": fit, "token_weights": "sif"},
    }
    for name, options in variants.items():
        model = st_embfilter.from_causal_lm(
            folder, layers=0, device="cpu", show_progress_bar=False, **{"keep": 1.0, **options}
        )
        yield name, np.asarray(model.encode(texts, batch_size=256, show_progress_bar=False))


def measure(
    name: str,
    folder: str,
    tasks: Sequence[Task],
    fit: list[str],
    python: str | None,
    states: Path,
    *,
    whole: bool,
) -> Iterator[Row]:
    texts = texts_of(tasks)
    place = {text: i for i, text in enumerate(texts)}
    d = json.loads((Path(folder) / "config.json").read_text())["hidden_size"]
    widths = [d // 2, DIMS]
    against: dict[tuple[str, int], tuple[Outcome, np.ndarray | None]] = {}
    forms = {"model2vec, no blocks": False, "model2vec": True}
    for label, blocks in forms.items():
        if python is None or (blocks and not whole):
            continue
        place_of = states / name / ("whole" if blocks else "none")
        theirs = distilled(python, folder, texts, widths, place_of, whole=blocks)
        for k, vectors in theirs.items():
            for task in tasks:
                outcome = task.run(Ready(place, vectors))
                best = against.get((task.info.name, k))
                if best is None or outcome.score > best[0].score:
                    against[task.info.name, k] = outcome, replicates(outcome, 1000, 0)
                yield Row(name, label, k, task.info.name, 100 * outcome.score)
    for variant, vectors in tables(folder, fit, texts):
        kept = [k for k in (d, 3 * d // 4, d // 2, DIMS, d // 4) if k <= vectors.shape[1]]
        for k in dict.fromkeys(kept):
            for task in tasks:
                outcome = task.run(Ready(place, np.ascontiguousarray(vectors[:, :k])))
                label = variant.replace("filter", "raw") if k == d else variant
                row = Row(name, label, k, task.info.name, 100 * outcome.score)
                reference, drawn = against.get((task.info.name, k), (None, None))
                mine = replicates(outcome, 1000, 0) if drawn is not None else None
                if reference is not None and mine is not None and drawn is not None:
                    low, high = interval(100 * (mine - drawn))
                    delta = 100 * (outcome.score - reference.score)
                    row = Row(name, label, k, task.info.name, row.score, delta, low, high)
                yield row


def read_rows() -> list[Row]:
    if not STATIC.is_file():
        return []
    return [Row(**json.loads(line)) for line in STATIC.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER")
    parser.add_argument("--model2vec", help="Python of an environment with model2vec.")
    parser.add_argument(
        "--no-blocks", action="store_true", help="model2vec of the embeddings alone."
    )
    parser.add_argument("--states", type=Path, help="Folder for what model2vec reads once.")
    options = parser.parse_args()
    tasks = read_tasks(options.data)
    corpus = read_corpus(options.data / "scifact" / "corpus.jsonl.gz")
    fit = list(corpus.values())[:FITTED_ON]
    rows = read_rows()
    for model in options.model:
        name, _, folder = model.partition("=")
        with tempfile.TemporaryDirectory() as scratch:
            states = options.states or Path(scratch)
            measured = measure(
                name, folder, tasks, fit, options.model2vec, states, whole=not options.no_blocks
            )
            found = list(measured)
        rows = [row for row in rows if row.model != name] + found
        STATIC.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows), encoding="utf-8")
        print(f"{name}: {len(found)} scores", flush=True)


if __name__ == "__main__":
    main()

"""Measures self-calibration on public data sets and writes docs/calibration.md's tables.

Every text is encoded once; a calibrated filter is an affine map of the raw vectors. Intervals are
95 % paired bootstrap intervals of the difference to the filter alone, at the same window.

    python benchmarks/calibration.py DATA --corpus FILE [--model MODEL]

DATA is a folder as in benchmarks/results.py; FILE holds texts from the domain that the model was
trained on, one a line. Without FILE only texts of the model's own are used.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import DEMO_LM, DOCS, REPOSITORY, read_tasks
from st_embfilter.evaluation.baselines import Transform
from st_embfilter.evaluation.bootstrap import Outcome, paired_interval
from st_embfilter.evaluation.sweep import Filtered, RawModel, raw_model
from st_embfilter.evaluation.tasks import Task
from st_embfilter.evaluation.vectors import VectorStore
from st_embfilter.model.calibrate import sample_texts
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.whitening import affine_map, moments

ROWS = DOCS / "calibration.jsonl"
PAGE = DOCS / "calibration.md"
START, END = "<!-- measured -->", "<!-- end -->"
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SIZES = (256, 1024, 4096)
ROOTS = ("symmetric", "cholesky", "principal")
WORDS = 28  # of a corpus text: about as long as a sampled one


def transform(
    raw: RawModel,
    keep: int,
    prefix: int,
    sample: torch.Tensor | None,
    strength: float,
    root: str = "symmetric",
) -> Transform:
    """The calibrated filter of width `keep`, cut to its first `prefix` outputs."""
    projection = raw.spectrum.projection(Band("bulk", keep)).double()
    if sample is None or strength == 0.0:
        return Transform(projection[:prefix].float())
    estimate = moments(sample.double() @ projection.T)
    matrix, _ = affine_map(estimate, strength)
    if root == "cholesky":  # lower triangular: a prefix is what would be calibrated at that width
        matrix = torch.linalg.cholesky(torch.linalg.inv(matrix @ matrix)).inverse()
    elif root == "principal":  # components of the covariance in order of variance
        axes = torch.linalg.eigh(estimate.covariance)[1]
        matrix = axes.flip(1).T @ matrix
    return Transform(
        (matrix @ projection)[:prefix].float(),
        (strength * projection.T @ estimate.mean).float(),
    )


def configurations(d: int, sources: list[str]) -> Iterator[dict[str, Any]]:
    """The whole grid."""
    for keep, source, size, strength in product((d, d // 2, d // 4), sources, SIZES, STRENGTHS[1:]):
        yield {"keep": keep, "source": source, "size": size, "strength": strength}


def measure(
    raw: RawModel, task: Task, samples: dict[str, torch.Tensor], store: VectorStore
) -> Iterator[dict[str, Any]]:
    d = raw.spectrum.d
    info = task.info
    facts = {"task": info.name, "type": info.task_type, "metric": info.metric}
    plain: dict[int, Outcome] = {}
    for keep in (d, d // 2, d // 4, d // 8):
        plain[keep] = task.run(Filtered(store, transform(raw, keep, keep, None, 0.0)))
        case = {"keep": keep, "prefix": keep, "source": "none", "size": 0, "strength": 0.0}
        yield {**facts, **case, "score": plain[keep].score, "delta": 0.0, "low": None, "high": None}
    cases = list(configurations(d, list(samples)))
    cases = [{**case, "prefix": case["keep"]} for case in cases]
    wide = {"keep": d, "source": "self", "size": 1024, "strength": 1.0}
    cases += [{**wide, "prefix": prefix} for prefix in (d // 2, d // 4, d // 8)]
    if info.task_type == "STS":
        inside = {**wide, "keep": d // 2}
        cuts = (d // 2, d // 4, d // 8)
        cases += [{**inside, "root": r, "prefix": cut} for r in ROOTS for cut in cuts]
    for case in cases:
        sample = samples[case["source"]][: case["size"]]
        root = case.get("root", "symmetric")
        mapped = transform(raw, case["keep"], case["prefix"], sample, case["strength"], root)
        outcome, reference = task.run(Filtered(store, mapped)), plain[case["prefix"]]
        low, high = paired_interval(outcome, reference, resamples=500) or (None, None)
        delta = outcome.score - reference.score
        yield {**facts, **case, "score": outcome.score, "delta": delta, "low": low, "high": high}


# The page ----------------------------------------------------------------------------------------


def cell(rows: list[dict[str, Any]], **wanted: Any) -> str:
    wanted.setdefault("root", None)
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        return ""
    row = found[0]
    score = f"{100 * row['score']:.1f}"
    if row["strength"] == 0.0 or row["low"] is None:
        return score
    return f"{score} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join('-' if i == 0 else '-:' for i in range(len(head)))}|",
        *(f"| {' | '.join(line)} |" for line in lines),
        "",
    ]


def page(rows: list[dict[str, Any]]) -> list[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    d = max(row["keep"] for row in rows)
    half = {"keep": d // 2, "prefix": d // 2}
    lines = [f"### Strength ({d // 2} of {d} dimensions, 1,024 texts of the model's own)\n"]
    plain = {"source": "none"}
    body = [["0 (filter alone)", *(cell(rows, task=t, **half, **plain) for t in tasks)]]
    for strength in STRENGTHS[1:]:
        case = {"source": "self", "size": 1024, "strength": strength}
        body.append([f"{strength:g}", *(cell(rows, task=t, **half, **case) for t in tasks)])
    lines += table(["strength", *tasks], body)
    lines += [f"### Texts ({d // 2} dimensions, strength 1)\n"]
    body = []
    for source in ("self", "corpus"):
        for size in SIZES:
            case = {"source": source, "size": size, "strength": 1.0}
            cells = [cell(rows, task=t, **half, **case) for t in tasks]
            if any(cells):
                name = "the model's own" if source == "self" else "from its training corpus"
                body.append([f"{size:,} {name}", *cells])
    lines += table(["texts", *tasks], body)
    lines += ["### Width (1,024 texts of the model's own, strength 1)\n"]
    body = []
    for width in (d, d // 2, d // 4, d // 8):
        case = {"prefix": width, "source": "self", "size": 1024, "strength": 1.0}
        alone = [cell(rows, task=t, keep=width, prefix=width, **plain) for t in tasks]
        body.append([f"{width}, filter alone", *alone])
        inside = [cell(rows, task=t, keep=width, **case) for t in tasks]
        if any(inside):
            body.append([f"{width}, calibrated inside the window", *inside])
        if width < d:
            cut = [cell(rows, task=t, keep=d, **case) for t in tasks]
            body.append([f"{width}, calibrated at {d}, then cut", *cut])
    lines += table(["dimensions", *tasks], body)
    lines += [f"### Roots ({tasks[0]}, {d // 2} dimensions, then cut)\n"]
    case = {"task": tasks[0], "keep": d // 2, "source": "self", "size": 1024, "strength": 1.0}
    cuts = (d // 2, d // 4, d // 8)
    body = [[root, *(cell(rows, **case, root=root, prefix=cut) for cut in cuts)] for root in ROOTS]
    lines += table(["root", *map(str, cuts)], body)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--model", default=str(DEMO_LM))
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "vectors")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    raw = raw_model(arguments.model, device="cpu")
    store = VectorStore(raw.model, cache=arguments.cache)
    texts = {"self": sample_texts(arguments.model, max(SIZES))}
    if arguments.corpus is not None:
        lines = [line for line in arguments.corpus.read_text().splitlines() if len(line) > 40]
        chosen = random.Random(0).sample(lines, max(SIZES))
        texts["corpus"] = [" ".join(line.split()[:WORDS]) for line in chosen]
    samples = {name: torch.from_numpy(store.encode(some)) for name, some in texts.items()}
    rows = []
    for task in read_tasks(arguments.data):
        for row in measure(raw, task, samples, store):
            rows.append(row)
            print(json.dumps(row), flush=True)
        store.forget()
    arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = arguments.page.read_text() if arguments.page.is_file() else f"{START}\n{END}\n"
    before, after = text.partition(START)[0], text.partition(END)[2]
    arguments.page.write_text("\n".join([before + START, "", *page(rows), END]) + after)


if __name__ == "__main__":
    main()

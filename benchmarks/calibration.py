"""Measures calibration on language models and writes docs/calibration.md.

The data and the cut of them are those of `benchmarks/depth.py`, and so is the cache of vectors:
what one of the two has encoded the other reads.

    python -m benchmarks.calibration DATA --model SmolLM2=path/to/folder [--model ...]
        [--recipe plain] [--texts generic] [--cache .cache/vectors] [--only-cached]
        [--cached-tasks] [--part core] [--templates]

Every text is encoded once, a calibrated filter is an affine map of the raw vectors. It can be
stopped and started again: texts that are encoded are in the cache, scores that are measured in
docs/calibration.jsonl. `--cached-tasks` measures the tasks that are encoded, `--only-cached`
encodes no calibration texts either. `--templates` measures PromptEOL beside the templates of
`NAMED_TEMPLATES`, on 300 pairs. Without a model the page is written from the scores.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor

from benchmarks.calibration_page import ROWS, STRENGTHS, WINDOWS, write_page
from benchmarks.depth import (
    LENGTHS,
    REPOSITORY,
    ParaphraseTask,
    chunks,
    open_model,
    read_tasks,
)
from st_embfilter.evaluation.baselines import Transform
from st_embfilter.evaluation.bootstrap import Floats, Outcome, interval, replicates
from st_embfilter.evaluation.data import read_labelled
from st_embfilter.evaluation.depth import CHUNK, DepthStore
from st_embfilter.evaluation.sweep import Filtered
from st_embfilter.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    STSTask,
    Task,
)
from st_embfilter.evaluation.vectors import Vectors, VectorStore, text_key
from st_embfilter.model.backbone import TEXT_ONLY, backbone_model, load_backbone
from st_embfilter.model.calibrate import generic_texts
from st_embfilter.model.cut import load_cut
from st_embfilter.model.depth import block_stack
from st_embfilter.model.prompts import NAMED_TEMPLATES
from st_embfilter.model.sampling import sample_texts
from st_embfilter.model.static import token_embeddings
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.spectrum import Spectrum
from st_embfilter.spectrum.whitening import Moments, affine_map, moments
from st_embfilter.unembedding.source import Source

RECIPES = ("static", "plain", "prompteol", "echo")
TEXTS = ("generic", "own", "self")
TASKS = ("STSBenchmark", "Banking77", "StackOverflow", "SciFact", "Paraphrases")
SIZE = 1024
SIZES = (SIZE, 256, 128)
SHRINKAGES = (0.0, 0.1, 0.3)

#: The templates that ask for one word, on a part of STSBenchmark, with fewer texts.
TEMPLATES = ("prompteol", *NAMED_TEMPLATES)
PAIRS = 300
FEW = 256
RESAMPLES = 500


@dataclass(frozen=True)
class Case:
    """One form of the map.

    Attributes:
        keep: Part of the directions, the window is `bulk`.
        texts: One of `TEXTS`, or "none" for the filter alone.
        size: Number of texts.
        strength: Strength of the whitening.
        shrinkage: Weight of the identity in the covariance; None for Ledoit and Wolf's.
    """

    keep: float
    texts: str = "none"
    size: int = 0
    strength: float = 0.0
    shrinkage: float | None = None


def cases(part: str) -> Iterator[Case]:
    """What is measured of a model, a recipe and a task.

    Args:
        part: "core" for every strength in every window with 1,024 generic texts, and for strengths
            0.5 and 1 with the task's own; "choices" for the task's own texts in every window,
            then, in 3/4, other numbers and origins of texts and other shrinkages, at three
            strengths; "full" for all of these at every strength and in every window;
            "templates" for what is measured of the templates.
    """
    grid = list(product(WINDOWS, STRENGTHS))
    if part == "templates":
        yield from (Case(keep, "generic", FEW, strength) for keep, strength in grid)
        return
    if part == "choices":
        some = (0.25, 0.5, 1.0)
        yield from (Case(keep, "own", SIZE, a) for keep, a in grid if a in some)
        yield from (Case(0.75, t, size, a) for size, t, a in product(SIZES, TEXTS, some))
        yield from (Case(0.75, "generic", SIZE, a, given) for given, a in product(SHRINKAGES, some))
        return
    yield from (Case(keep, "generic", SIZE, strength) for keep, strength in grid)
    yield from (Case(keep, "own", SIZE, a) for keep, a in grid if a in (0.5, 1.0))
    if part == "full":
        for size, texts in product(SIZES, TEXTS):
            yield from (Case(keep, texts, size, strength) for keep, strength in grid)
        for shrinkage, strength in product(SHRINKAGES, STRENGTHS):
            yield Case(0.75, "generic", SIZE, strength, shrinkage)


# Texts --------------------------------------------------------------------------------------------


def own_texts(task: Task, data: Path) -> list[str]:
    """Texts of a task's own kind that it neither scores nor learns from; none of some tasks."""
    if isinstance(task, ParaphraseTask):
        return []
    if isinstance(task, STSTask):
        used = {text for pair in task.pairs for text in pair[:2]}
        with (data / "stsb" / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as lines:
            found = [cell for row in csv.reader(lines) for cell in row[:2]]
    elif isinstance(task, ClassificationTask):
        used = {text for text, _ in [*task.train, *task.test]}
        found = [text for _, text, _ in read_labelled(data / "banking77" / "train.csv")]
    elif isinstance(task, ClusteringTask):
        used = {text for text, _ in task.texts}
        found = [text for _, text, _ in read_labelled(data / "stackoverflow" / "titles.txt")]
    elif isinstance(task, RetrievalTask):
        used = {task.queries[query] for query in task.judgements}
        found = list(task.queries.values())
    else:
        raise ValueError(f"no texts of the kind of {task.info.name} are known")
    rest = sorted({text for text in found if text.strip()} - used)
    return random.Random(0).sample(rest, min(SIZE, len(rest)))


def some_pairs(task: Task) -> STSTask:
    """A part of the pairs, the same every time, as a task of its own."""
    if not isinstance(task, STSTask):
        raise ValueError(f"pairs are those of STS, got {task.info.name}")
    info = replace(task.info, name=f"{task.info.name}, {PAIRS} pairs")
    return replace(task, info=info, pairs=random.Random(0).sample(list(task.pairs), PAIRS))


def self_texts(path: str, folder: Path, size: int, only_cached: bool) -> list[str]:
    """Texts that a model writes itself; kept in a file, because sampling takes minutes."""
    file = folder / f"self-{size}-{text_key([path])[:16]}.json"
    if not file.is_file():
        if only_cached:
            return []
        texts = sample_texts(path, size, show_progress_bar=False)
        file.write_text(json.dumps(texts), encoding="utf-8")
    kept: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return kept


# Vectors ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def spectrum_of(path: str) -> Spectrum:
    return Source.of(path).unembedding().fit(precision="float64")[0]


def static_model(path: str) -> SentenceTransformer:
    """The table of normed token embeddings, before any filter."""
    load = partial(
        load_backbone,
        max_seq_length=512,
        dtype=torch.float32,
        module_class=Transformer,
        modality_config=TEXT_ONLY,
    )
    backbone, _ = load_cut(Source.of(path), 0, load)
    return SentenceTransformer(modules=[token_embeddings(backbone)], device="cpu")


class Vectored:
    """A model with a recipe, what it has encoded, and what it may still encode."""

    def __init__(self, path: str, recipe: str, task: Task, folder: Path) -> None:
        self.depths: DepthStore | None = None
        self.store: VectorStore
        if recipe == "static":
            model = static_model(path)
            self.spectrum = spectrum_of(path)
            self.store = VectorStore(model, show_progress_bar=False)
        else:
            raw = open_model(path, recipe, task)
            self.spectrum = raw.spectrum
            total = len(block_stack(backbone_model(raw.model))[1])
            self.depths = DepthStore(raw.model, [total], cache=folder, show_progress_bar=False)
            self.store = self.depths.at(total)

    def has(self, parts: Iterable[tuple[list[str], str]]) -> bool:
        """Whether chunks of texts are encoded, each with its method; a table is fast enough."""
        depths = self.depths
        return depths is None or all(
            depths.file(text_key(texts, method), depths.layers[0], "own").is_file()
            for texts, method in parts
        )


def chunked(texts: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """The chunks in which a store encodes texts."""
    unique = sorted(dict.fromkeys(texts), key=len, reverse=True)
    for first in range(0, len(unique), CHUNK):
        yield unique[first : first + CHUNK], "encode"


# Scores -------------------------------------------------------------------------------------------


def estimate(sample: Tensor, shrinkage: float | None) -> Moments:
    """Moments of filtered vectors (n, k), shrunk by Ledoit and Wolf's weight or a given one."""
    if shrinkage is None:
        return moments(sample)
    covariance = torch.cov(sample.T, correction=0)
    target = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    return Moments(sample.mean(dim=0), (1 - shrinkage) * covariance + shrinkage * target, shrinkage)


class Maps:
    """The calibrated filters of one model; a covariance serves all strengths."""

    def __init__(self, spectrum: Spectrum, samples: dict[str, Vectors]) -> None:
        self.spectrum = spectrum
        self.samples = samples
        self.known: dict[Case, Moments] = {}

    def transform(self, case: Case) -> Transform:
        projection = self.spectrum.projection(Band("bulk", case.keep)).double()
        if case.texts == "none":
            return Transform(projection.float())
        key = Case(case.keep, case.texts, case.size, 0.0, case.shrinkage)
        if key not in self.known:
            sample = torch.from_numpy(self.samples[case.texts][: case.size]).double()
            self.known[key] = estimate(sample @ projection.T, case.shrinkage)
        found = self.known[key]
        matrix, _ = affine_map(found, case.strength)
        return Transform(
            (matrix @ projection).float(),
            (case.strength * projection.T @ found.mean).float(),
        )


def measure(
    maps: Maps, task: Task, store: VectorStore, grid: Iterable[Case], done: set[Case]
) -> Iterator[dict[str, Any]]:
    """The cases that are not done, each with its difference to the filter alone of its width."""
    alone: dict[float, tuple[Outcome, Floats | None]] = {}

    def run(case: Case) -> tuple[Outcome, Floats | None]:
        outcome = task.run(Filtered(store, maps.transform(case)))
        return outcome, replicates(outcome, RESAMPLES)

    todo = dict.fromkeys(case for case in grid if case.texts in maps.samples and case not in done)
    for case in todo:
        if len(maps.samples[case.texts]) < case.size:
            continue
        if case.keep not in alone:
            plain = Case(case.keep)
            alone[case.keep] = run(plain)
            if plain not in done:
                yield {**asdict(plain), "score": alone[case.keep][0].score}
        reference, theirs = alone[case.keep]
        outcome, mine = run(case)
        row = {**asdict(case), "score": outcome.score, "delta": outcome.score - reference.score}
        if mine is not None and theirs is not None:
            row["low"], row["high"] = interval(mine - theirs)
        yield row


def case_of(row: dict[str, Any]) -> Case:
    return Case(row["keep"], row["texts"], row["size"], row["strength"], row["shrinkage"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER_OR_HUB_ID")
    parser.add_argument("--recipe", action="append", choices=[*RECIPES, *NAMED_TEMPLATES])
    parser.add_argument("--templates", action="store_true")
    parser.add_argument("--part", choices=("core", "choices", "full"), default="full")
    parser.add_argument("--texts", action="append", choices=TEXTS)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--self-size", type=int, default=FEW, help="Texts that a model writes.")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "vectors")
    parser.add_argument("--only-cached", action="store_true", help="Encode nothing.")
    parser.add_argument("--cached-tasks", action="store_true", help="Encode no task.")
    parser.add_argument("--rows", type=Path, default=ROWS)
    options = parser.parse_args()
    lines = options.rows.read_text().splitlines() if options.rows.is_file() else []
    rows = [json.loads(line) for line in lines]
    tasks: list[Task] = []
    if options.model:
        found = {task.info.name: task for task in read_tasks(options.data)}
        tasks = [found[name] for name in options.task or TASKS]
    if options.templates:
        options.texts = ["generic"]
        tasks = [some_pairs(found["STSBenchmark"])]
    for model in options.model:
        name, _, path = model.partition("=")
        for recipe in options.recipe or (TEMPLATES if options.templates else RECIPES):
            for more in one_model(name, path, recipe, tasks, rows, options):
                rows.append(more)
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(more) + "\n")
    write_page(rows)


def one_model(
    name: str,
    path: str,
    recipe: str,
    tasks: Sequence[Task],
    rows: list[dict[str, Any]],
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The rows of one model with one recipe."""
    vectored: Vectored | None = None
    length = 0
    for task in tasks:
        wanted = LENGTHS.get(task.info.name, 512)
        if vectored is None or length != wanted:
            vectored, length = Vectored(path, recipe, task, options.cache), wanted
        here = {"model": name, "recipe": recipe, "task": task.info.name}
        leave_out = options.only_cached or options.cached_tasks
        if leave_out and not vectored.has(chunks(task)):
            print(*here.values(), "not encoded, left out", flush=True)
            continue
        samples = {}
        for kind in options.texts or TEXTS:
            if kind == "generic":
                texts = generic_texts(FEW if options.templates else SIZE)
            elif kind == "own":
                texts = own_texts(task, options.data)
            else:
                texts = self_texts(path, options.cache, options.self_size, options.only_cached)
            if texts and (not options.only_cached or vectored.has(chunked(texts))):
                samples[kind] = vectored.store.encode(texts)
        print(*here.values(), *samples, flush=True)
        done = {case_of(row) for row in rows if all(row[key] == here[key] for key in here)}
        facts = {**here, "metric": task.info.metric, "d": vectored.spectrum.d}
        grid = cases("templates" if options.templates else options.part)
        for row in measure(Maps(vectored.spectrum, samples), task, vectored.store, grid, done):
            yield {**facts, **row}
        vectored.store.forget()


if __name__ == "__main__":
    main()

"""What a sweep of 40 configurations, or over all depths, costs against encoding once.

Measures on one model and the texts of `examples/data`: encoding every text once with plain
sentence-transformers; scoring 40 sets of ready vectors, intervals included; and the sweep, which
does both and keeps its own books. Without a cache on disk. With --depths: encoding once; the
vectors after every block, both poolings, written to disk; and the whole sweep of raw and filter at
every depth, scores and intervals included.

    python benchmarks/sweep.py [--model FOLDER] [--repeat 3] [--depths] [--texts 256]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from examples.demo import OPENSTAX as DEMO_LM
from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.bootstrap import Outcome, interval, replicates
from st_embfilter.evaluation.demo import DEMO_TEXTS, Paraphrases
from st_embfilter.evaluation.depth import DepthStore
from st_embfilter.evaluation.sweep import RawModel, raw_model, sweep
from st_embfilter.evaluation.tasks import RetrievalTask, STSTask, Task, TaskInfo
from st_embfilter.evaluation.vectors import Vectors
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import block_stack

RESAMPLES = 1000


def tasks() -> list[Task]:
    """Pairs and searches among the demo texts."""
    data = Paraphrases.read(DEMO_TEXTS)
    pairs = []
    queries: dict[str, str] = {}
    judged: dict[str, dict[str, int]] = {}
    documents = {f"d{i}": text for i, text in enumerate(data.texts) if not data.is_paraphrase[i]}
    for group in sorted(set(data.groups.tolist())):
        members = [i for i, g in enumerate(data.groups) if g == group]
        for i, j in combinations(members, 2):
            both = bool(data.is_paraphrase[i] and data.is_paraphrase[j])
            pairs.append((data.texts[i], data.texts[j], float(both)))
        first, *others = [i for i in members if data.is_paraphrase[i]]
        queries[f"q{first}"] = data.texts[first]
        judged[f"q{first}"] = {f"d{i}": 1 for i in others}
        documents |= {f"d{i}": data.texts[i] for i in others}
    return [
        STSTask(TaskInfo("pairs", "STS", "demo", "all", "cosine_spearman"), pairs),
        RetrievalTask(
            TaskInfo("search", "Retrieval", "demo", "all", "ndcg_at_10"), documents, queries, judged
        ),
    ]


def configurations(d: int) -> list[Configuration]:
    """39 windows; the sweep adds the raw model."""
    bands = [
        Configuration(f"offset:{offset}", width)
        for width in (d // 2, d // 4, d // 8)
        for offset in range(0, d - width + 1, d // 16)
    ]
    return (bands + [Configuration("bulk", d - i) for i in range(40)])[:39]


class Recorder:
    """Remembers which texts a task asks for."""

    def __init__(self, raw: RawModel) -> None:
        self.raw = raw
        self.texts: dict[str, None] = {}

    def encode(self, texts: Sequence[str], **_: object) -> Vectors:
        self.texts.update(dict.fromkeys(texts))
        return self.raw.model.encode(list(texts), show_progress_bar=False)


class Ready:
    """Gives vectors that are ready."""

    def __init__(self, texts: list[str], vectors: Vectors) -> None:
        self.place = {text: i for i, text in enumerate(texts)}
        self.vectors = vectors

    def encode(self, texts: Sequence[str], **_: object) -> Vectors:
        return self.vectors[[self.place[text] for text in texts]]


def timed(
    works: Sequence[Callable[[], object]],
    repeat: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each, done in turn: a busy minute of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeat):
        for work, taken in zip(works, seconds, strict=True):
            start = clock()
            work()
            taken.append(clock() - start)
    return [statistics.median(taken) for taken in seconds]


def depths(raw: RawModel, count: int, repeat: int) -> None:
    """Prints what all depths cost, against one encoding of the whole model."""
    texts = Paraphrases.read(DEMO_TEXTS).texts[:count]
    pairs = [(a, b, float(len(a))) for a, b in zip(texts[::2], texts[1::2], strict=False)]
    task = STSTask(TaskInfo("pairs", "STS", "demo", "all", "cosine_spearman"), pairs)
    total = len(block_stack(backbone_model(raw.model))[1])
    asked = sorted(dict.fromkeys(texts), key=len, reverse=True)

    def encode() -> object:
        return raw.model.encode(asked, show_progress_bar=False)

    def collect() -> object:
        store = DepthStore(raw.model, range(total + 1), show_progress_bar=False)
        return [store.at(n).encode(asked) for n in store.layers]

    def whole() -> object:
        chosen = [Configuration("bulk", 1 / 2)]
        return list(sweep(raw, [task], chosen, layers="all", show_progress_bar=False))

    encode()
    encoding, collecting, sweeping = timed((encode, collect, whole), repeat, time.process_time)
    print("seconds of the processor")
    print(f"texts                    {len(asked):8,}")
    print(f"encoding once            {encoding:8.2f} s")
    print(f"vectors at {total + 1:2} depths     {collecting:8.2f} s   {collecting / encoding:.2f}x")
    print(
        f"sweep of {2 * (total + 1):2} scores       {sweeping:8.2f} s   {sweeping / encoding:.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_LM)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--depths", action="store_true", help="every depth, not 40 windows")
    parser.add_argument("--texts", type=int, default=256, help="with --depths")
    arguments = parser.parse_args()
    raw = raw_model(arguments.model, device="cpu", show_progress_bar=False)
    if arguments.depths:
        depths(raw, arguments.texts, arguments.repeat)
        return
    measured = tasks()
    chosen = configurations(raw.spectrum.d)
    # Each task's texts are encoded for that task, in the sweep as here.
    recorders = []
    for task in measured:
        recorders.append(Recorder(raw))
        task.run(recorders[-1])
    texts = [list(recorder.texts) for recorder in recorders]

    def encode() -> list[Vectors]:
        return [raw.model.encode(part, show_progress_bar=False) for part in texts]

    vectors = encode()
    transforms = [None, *(c.transforms(raw.spectrum)[0] for c in chosen)]
    ready = [
        [Ready(t, v if f is None else f(v)) for f in transforms]
        for t, v in zip(texts, vectors, strict=True)
    ]

    def score() -> None:
        for task, encoders in zip(measured, ready, strict=True):
            for encoder in encoders:
                outcome: Outcome = task.run(encoder)
                drawn = replicates(outcome, RESAMPLES)
                if drawn is not None:
                    interval(drawn)

    def whole() -> None:
        rows = list(sweep(raw, measured, chosen, resamples=RESAMPLES, show_progress_bar=False))
        if len(rows) != 40 * len(measured):
            raise SystemExit(f"expected 40 rows a task, got {len(rows)}")

    encoding, scoring, total = timed((encode, score, whole), arguments.repeat)
    floor = encoding + scoring
    print(f"texts                    {sum(map(len, texts)):8,}")
    print(f"encoding once            {encoding:8.2f} s")
    print(f"scoring 40 times         {scoring:8.2f} s")
    print(f"sweep of 40              {total:8.2f} s   {total / floor:.2f}x encoding once + scoring")
    print(f"encoding 40 times        {40 * encoding:8.2f} s   (not run)")


if __name__ == "__main__":
    main()

"""What a sweep of 40 configurations costs, against encoding once and scoring.

Measures on one model and the texts of `examples/data`: encoding every text once with plain
sentence-transformers; scoring 40 sets of ready vectors, intervals included; and the sweep, which
does both and keeps its own books. Without a cache on disk.

    python benchmarks/sweep.py [--model FOLDER] [--repeat 3]
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
from st_embfilter.evaluation.sweep import RawModel, raw_model, sweep
from st_embfilter.evaluation.tasks import RetrievalTask, STSTask, Task, TaskInfo
from st_embfilter.evaluation.vectors import Vectors

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


def timed(works: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Median seconds of each, done in turn: a busy minute of the machine hits all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(repeat):
        for work, taken in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_LM)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    raw = raw_model(arguments.model, device="cpu", show_progress_bar=False)
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

"""MTEB's tasks on local data: MTEB's number, ours, and that of a saved and reloaded model agree."""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import st_embfilter
from st_embfilter.errors import DataError
from st_embfilter.evaluation.baselines import Configuration
from st_embfilter.evaluation.sweep import Filtered, RawModel, raw_model, sweep
from st_embfilter.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    RetrievalTask,
    STSTask,
    TaskInfo,
)
from st_embfilter.evaluation.vectors import VectorStore
from tests.conftest import same, tiny_lm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mteb = pytest.importorskip("mteb", reason="the extra `eval` is not installed")
    from datasets import Dataset, DatasetDict

    from st_embfilter.evaluation.mteb import MTEBTask, mteb_tasks

pytestmark = pytest.mark.filterwarnings("ignore")  # of mteb, datasets and their dependencies

RNG = np.random.default_rng(0)
N = 120
TOPICS = RNG.integers(0, 4, size=N).tolist()
TEXTS = [
    " ".join(f"w{40 * topic + word}" for word in RNG.integers(14, 50, size=RNG.integers(3, 9)))
    for topic in TOPICS
]
INFO = TaskInfo("local", "", "local", "test", "")


def pairs() -> list[tuple[str, str, float]]:
    left, right = RNG.permutation(N).reshape(2, 60)
    scores = RNG.integers(0, 6, size=60) / 1.0
    return [(TEXTS[i], TEXTS[j], s) for i, j, s in zip(left, right, scores.tolist(), strict=True)]


PAIRS = pairs()
DOCUMENTS = {f"d{i}": text for i, text in enumerate(TEXTS[20:])}
DOCUMENTS["same"] = DOCUMENTS["d3"]  # equal scores: the order of ties counts
QUERIES = {f"q{i}": TEXTS[i] for i in range(20)}
JUDGED = {q: {f"d{(7 * i + j) % 80}": 1 + j % 2 for j in range(3)} for i, q in enumerate(QUERIES)}
LABELLED = list(zip(TEXTS, TOPICS, strict=True))
TRAIN, TEST = LABELLED[::2], LABELLED[1::2]


def table(**columns: list[Any]) -> Any:
    return Dataset.from_dict(columns)


def sts() -> Any:
    task = mteb.get_task("STSBenchmark")
    a, b, s = map(list, zip(*PAIRS, strict=True))
    task.dataset = {"test": table(sentence1=a, sentence2=b, score=s)}
    return task


def pair_classification() -> Any:
    task = mteb.get_task("TwitterSemEval2015")
    a, b, s = map(list, zip(*PAIRS, strict=True))
    task.dataset = {"test": table(sentence1=[a], sentence2=[b], labels=[[int(x > 2) for x in s]])}
    return task


def retrieval(name: str = "SciFact", ranked: bool = False) -> Any:
    task = mteb.get_task(name)
    task.dataset = {
        "default": {
            "test": {
                "corpus": table(
                    id=list(DOCUMENTS), text=list(DOCUMENTS.values()), title=[""] * len(DOCUMENTS)
                ),
                "queries": table(id=list(QUERIES), text=list(QUERIES.values())),
                "relevant_docs": {q: dict(judged) for q, judged in JUDGED.items()},
                "top_ranked": {q: [*JUDGED[q], "d70", "d5"] for q in QUERIES} if ranked else None,
            }
        }
    }
    return task


def reranking() -> Any:
    return retrieval("SciDocsRR", ranked=True)


def classification() -> Any:
    task = mteb.get_task("Banking77Classification")
    task.dataset = DatasetDict(
        {
            name: table(text=[t for t, _ in rows], label=[label for _, label in rows])
            for name, rows in (("train", TRAIN), ("test", TEST))
        }
    )
    return task


def clustering_sets() -> Any:
    task = mteb.get_task("TwentyNewsgroupsClustering")
    task.dataset = {
        "test": table(sentences=[TEXTS[:60], TEXTS[60:]], labels=[TOPICS[:60], TOPICS[60:]])
    }
    return task


def clustering() -> Any:
    task = mteb.get_task("TwentyNewsgroupsClustering.v2")
    task.dataset = {"test": table(sentences=TEXTS, labels=TOPICS)}
    task.max_document_to_embed = 80
    task.max_fraction_of_documents_to_embed = None
    task.max_documents_per_cluster = 256
    return task


def summaries() -> Any:
    task = mteb.get_task("SummEval")
    task.dataset = {
        "test": table(
            text=TEXTS[:4],
            human_summaries=[TEXTS[i : i + 3] for i in range(4)],
            machine_summaries=[TEXTS[i : i + 5] for i in range(20, 24)],
            relevance=[[1.0, 4.0, 2.0, 5.0, 3.5]] * 4,
        )
    }
    return task


TASKS: list[Callable[[], Any]] = [
    sts,
    pair_classification,
    retrieval,
    reranking,
    classification,
    clustering_sets,
    clustering,
    summaries,
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm(folder)
    return folder


@pytest.fixture(scope="module")
def raw(lm: Path) -> RawModel:
    return raw_model(lm, device="cpu", show_progress_bar=False)


@pytest.fixture(scope="module")
def saved(lm: Path) -> Path:
    """A filtered model as a user has it: saved, to be loaded with plain ST."""
    model = st_embfilter.from_causal_lm(lm, keep=16, device="cpu", show_progress_bar=False)
    return st_embfilter.save_pretrained(model, lm.with_name("saved"))


@pytest.fixture(scope="module")
def store(raw: RawModel) -> VectorStore:
    return VectorStore(raw.model, show_progress_bar=False)


def ready(make: Callable[[], Any]) -> Any:
    task = make()
    task.data_loaded = True
    return task


def official(model: SentenceTransformer, make: Callable[[], Any]) -> float:
    """The number of `mteb.evaluate` on a plain SentenceTransformer."""
    result = mteb.evaluate(
        model,
        ready(make),
        cache=None,
        co2_tracker=False,
        encode_kwargs={"show_progress_bar": False},
        show_progress_bar=False,
    )
    return float(result.task_results[0].get_score())


class Recorded:
    """An encoder that keeps what it gave, for a model to answer with.

    Ranks and neighbours may hang on the last bits of vectors, and those on batch and processor.
    """

    def __init__(self, encoder: Filtered) -> None:
        self.encoder = encoder
        self.vectors: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        for text, vector in zip(texts, self.encoder.encode(texts, **options), strict=True):
            self.vectors.setdefault(text, vector)
        return np.stack([self.vectors[text] for text in texts])

    def answers_for(self, model: SentenceTransformer) -> None:
        """The model's own vectors must be these up to rounding."""
        own = model.encode

        def encode(inputs: Any, **options: Any) -> Any:
            given = own(inputs, **options)
            mine = np.stack([self.vectors[text] for text in inputs])
            assert same(given, mine)
            return torch.from_numpy(mine) if isinstance(given, torch.Tensor) else mine

        vars(model)["encode"] = encode


BULK = Configuration("bulk", 16)


@pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
def test_the_sweep_gives_the_score_of_mteb_on_the_saved_model(
    raw: RawModel, store: VectorStore, saved: Path, make: Callable[[], Any]
) -> None:
    encoder = Recorded(Filtered(store, BULK.transforms(raw.spectrum)[0]))
    task = MTEBTask(ready(make), raw.model)
    first = task.run(encoder)
    reloaded = SentenceTransformer(str(saved), device="cpu")
    encoder.answers_for(reloaded)
    # Of the same vectors; MTEB rounds to six digits, retrieval to five.
    assert first.score == pytest.approx(official(reloaded, make), abs=1e-5)
    assert first.statistic is not None
    # Retrieval scores are rounded to five digits.
    assert first.statistic(np.ones((1, sum(first.sizes))))[0] == pytest.approx(
        first.score, abs=1e-5
    )
    if make is clustering:  # a second run draws the same samples
        assert task.run(encoder).score == first.score


@pytest.mark.parametrize(
    ("make", "mine"),
    [
        (sts, STSTask(INFO, PAIRS)),
        (retrieval, RetrievalTask(INFO, DOCUMENTS, QUERIES, JUDGED)),
        (
            classification,
            ClassificationTask(
                INFO,
                [(t, str(label)) for t, label in TRAIN],
                [(t, str(label)) for t, label in TEST],
            ),
        ),
        (
            clustering,
            ClusteringTask(INFO, [(t, f"{i:02}") for t, i in zip(TEXTS, TOPICS, strict=True)]),
        ),
    ],
    ids=["sts", "retrieval", "classification", "clustering"],
)
def test_local_tasks_give_the_score_of_mteb(
    raw: RawModel,
    store: VectorStore,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    mine: Any,
) -> None:
    task = ready(make)
    if make is clustering:
        task.max_document_to_embed = None
        mine = replace(mine, size=task.max_documents_per_cluster)
    encoder = Filtered(store, BULK.transforms(raw.spectrum)[0])
    theirs = MTEBTask(task, raw.model).run(encoder).score
    # MTEB rounds retrieval scores to five digits.
    assert mine.run(encoder).score == pytest.approx(theirs, abs=6e-6)


def test_presets(raw: RawModel) -> None:
    """The paper's columns: STS 10, classification 12, clustering 11, pairs 3, rerank 4, ..."""
    tasks = mteb_tasks(raw.model, ["embedfilter-paper"])
    assert Counter(task.info.task_type for task in tasks) == {
        "STS": 10,
        "Classification": 12,
        "Clustering": 11,
        "PairClassification": 3,
        "Reranking": 4,
        "Retrieval": 8,
        "Summarization": 1,
    }
    quick = [task.info.task_type for task in mteb_tasks(raw.model, ["quick"])]
    assert len(quick) == len(set(quick)) == 7
    with pytest.raises(DataError, match="got 'NoSuchTask'"):
        mteb_tasks(raw.model, ["NoSuchTask"])


def test_a_task_of_mteb_in_a_sweep(raw: RawModel) -> None:
    task = MTEBTask(ready(sts), raw.model)
    rows = list(sweep(raw, [task], [BULK], resamples=50, show_progress_bar=False))
    assert [(row.task, row.split, row.metric) for row in rows] == [
        ("STSBenchmark", "test", "cosine_spearman")
    ] * 2
    assert rows[1].delta_low is not None
    assert rows[1].delta_high is not None
    assert rows[1].delta_low <= rows[1].delta <= rows[1].delta_high
    assert rows[1].measured_by.startswith("mteb 2.")
    assert task.task.data_loaded  # data that it was given are not its to free

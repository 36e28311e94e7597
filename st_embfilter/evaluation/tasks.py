"""Tasks on local files, scored as MTEB scores its own."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from st_embfilter.errors import DataError
from st_embfilter.evaluation.bootstrap import (
    Outcome,
    mean_statistic,
    over_runs,
    spearman_statistic,
    v_measure_statistic,
)
from st_embfilter.evaluation.data import (
    beir_files,
    check_classes,
    file_revision,
    read_corpus,
    read_judgements,
    read_labelled,
    read_pairs,
)
from st_embfilter.evaluation.metrics import ndcg_of_gains
from st_embfilter.evaluation.vectors import Encoder, Vectors
from st_embfilter.spectrum.unit import unit_rows

#: MTEB's protocol: seed, repetitions, training texts of each label, texts clustered at a time.
SEED: Final = 42
EXPERIMENTS: Final = 10
SAMPLES_PER_LABEL: Final = 8
CLUSTERED_TEXTS: Final = 16_384

_QUERIES_AT_A_TIME: Final = 256


@dataclass(frozen=True)
class TaskInfo:
    """What is measured.

    Attributes:
        name: Name of the task.
        task_type: MTEB's kind of task: STS, Retrieval, Classification, Clustering ...
        dataset: Name of the data.
        split: Part of the data.
        metric: Name of the main score, as in MTEB.
        revision: Version of the data; for files a hash of their bytes.
        measured_by: Whose code computed the score.
    """

    name: str
    task_type: str
    dataset: str
    split: str
    metric: str
    revision: str | None = None
    measured_by: str = ""


class Task(Protocol):
    """Something that an encoder can be measured on."""

    @property
    def info(self) -> TaskInfo:
        """What is measured."""
        ...

    def run(self, encoder: Encoder) -> Outcome:
        """Measures an encoder."""
        ...


@runtime_checkable
class Releasable(Protocol):
    """A task that holds data in memory which it can load again."""

    def release(self) -> None:
        """Frees them."""
        ...


class Splittable(Task, Protocol):
    """A task that can be cut into a development and a held-out half."""

    def halves(self, seed: int = 0) -> tuple[Task, Task]:
        """Two disjoint random halves."""
        ...


@dataclass(frozen=True)
class STSTask:
    """Spearman correlation of cosines with similarity scores.

    Attributes:
        info: What is measured.
        pairs: Text, text, score.
    """

    info: TaskInfo
    pairs: Sequence[tuple[str, str, float]]

    @classmethod
    def read(cls, file: str | os.PathLike[str], name: str | None = None) -> STSTask:
        """Reads a file of `read_pairs`."""
        path = Path(file)
        return cls(_info(path, name, "STS", "cosine_spearman", [path]), read_pairs(path))

    def run(self, encoder: Encoder) -> Outcome:
        """Measures an encoder; the resampled units are pairs."""
        texts = [first for first, _, _ in self.pairs] + [second for _, second, _ in self.pairs]
        left, right = np.split(unit_rows(encoder.encode(texts).astype(np.float64)), 2)
        # Rounded, so that every text is exactly as near to itself as any other.
        cosines = np.einsum("ij,ij->i", left, right).round(12)
        scores = [score for _, _, score in self.pairs]
        return Outcome.of(((len(scores),), spearman_statistic(cosines, scores)))

    def halves(self, seed: int = 0) -> tuple[STSTask, STSTask]:
        """Two disjoint random halves of the pairs."""
        first, second = _halves(len(self.pairs), seed)
        return (
            replace(self, info=_half(self.info, 1), pairs=[self.pairs[i] for i in first]),
            replace(self, info=_half(self.info, 2), pairs=[self.pairs[i] for i in second]),
        )


@dataclass(frozen=True)
class RetrievalTask:
    """nDCG@10 of a search by cosine.

    Attributes:
        info: What is measured.
        documents: Id to text.
        queries: Id to text; those without a judgement are not asked.
        judgements: Query id to document id to gain.
    """

    info: TaskInfo
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]

    @classmethod
    def read(
        cls, folder: str | os.PathLike[str], name: str | None = None, *, split: str = "test"
    ) -> RetrievalTask:
        """Reads a BEIR folder."""
        files = beir_files(folder, split)
        documents, queries = read_corpus(files[0]), read_corpus(files[1])
        judgements = read_judgements(files[2], queries, documents)
        info = _info(Path(folder), name, "Retrieval", "ndcg_at_10", files)
        return cls(replace(info, split=split), documents, queries, judgements)

    def run(self, encoder: Encoder) -> Outcome:
        """Measures an encoder; the resampled units are queries."""
        ids = np.array(list(self.documents))
        asked = list(self.judgements)
        documents = unit_rows(
            encoder.encode(list(self.documents.values()), method="encode_document")
        )
        queries = unit_rows(
            encoder.encode([self.queries[query] for query in asked], method="encode_query")
        )
        values = []
        for first in range(0, len(asked), _QUERIES_AT_A_TIME):
            names = asked[first : first + _QUERIES_AT_A_TIME]
            cosines = queries[first : first + _QUERIES_AT_A_TIME] @ documents.T
            for query, row in zip(names, cosines, strict=True):
                gains = self.judgements[query]
                ranked = [gains.get(key, 0) for key in _top(row, ids, 10)]
                values.append(ndcg_of_gains(ranked, list(gains.values())))
        return Outcome.of(((len(values),), mean_statistic(values)))

    def halves(self, seed: int = 0) -> tuple[RetrievalTask, RetrievalTask]:
        """Two disjoint random halves of the queries, over all documents."""
        asked = list(self.judgements)
        parts = [
            {asked[i]: self.judgements[asked[i]] for i in half}
            for half in _halves(len(asked), seed)
        ]
        return (
            replace(self, info=_half(self.info, 1), judgements=parts[0]),
            replace(self, info=_half(self.info, 2), judgements=parts[1]),
        )


@dataclass(frozen=True)
class ClassificationTask:
    """Accuracy of logistic regression on few examples, the mean of several draws.

    Attributes:
        info: What is measured.
        train: Text, label.
        test: Text, label.
        runs: Number of draws.
    """

    info: TaskInfo
    train: Sequence[tuple[str, str]]
    test: Sequence[tuple[str, str]]
    runs: int = EXPERIMENTS

    @classmethod
    def read(cls, folder: str | os.PathLike[str], name: str | None = None) -> ClassificationTask:
        """Reads a folder with train.csv and test.csv (or .tsv) of `read_labelled`."""
        files = [_table(Path(folder), split) for split in ("train", "test")]
        train, test = (read_labelled(file) for file in files)
        check_classes(files[0], train)
        check_classes(files[1], test, {label: None for _, _, label in train})
        info = _info(Path(folder), name, "Classification", "accuracy", files)
        return cls(
            replace(info, split="test"),
            [(text, label) for _, text, label in train],
            [(text, label) for _, text, label in test],
        )

    def run(self, encoder: Encoder) -> Outcome:
        """Measures an encoder; drawn are test texts, and runs."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        labels = np.array([label for _, label in self.train])
        expected = np.array([label for _, label in self.test])
        draws = _few_of_each(labels, self.runs)
        union = sorted(set().union(*draws))
        place = {index: i for i, index in enumerate(union)}
        known = encoder.encode([self.train[i][0] for i in union])
        asked = encoder.encode([text for text, _ in self.test])
        runs = []
        for drawn in draws:
            classifier = LogisticRegression(max_iter=100, random_state=SEED)
            with warnings.catch_warnings():
                # MTEB's limit of iterations, reached or not.
                warnings.simplefilter("ignore", ConvergenceWarning)
                classifier.fit(known[[place[i] for i in drawn]], labels[drawn])
            runs.append(mean_statistic(classifier.predict(asked) == expected))
        return Outcome.of(over_runs(len(expected), runs))

    def halves(self, seed: int = 0) -> tuple[ClassificationTask, ClassificationTask]:
        """Two disjoint random halves of the test texts, with the same training texts."""
        first, second = _halves(len(self.test), seed)
        return (
            replace(self, info=_half(self.info, 1), test=[self.test[i] for i in first]),
            replace(self, info=_half(self.info, 2), test=[self.test[i] for i in second]),
        )


@dataclass(frozen=True)
class ClusteringTask:
    """V-measure of k-means clusters, the mean of several random samples of the texts.

    Attributes:
        info: What is measured.
        texts: Text, label.
        runs: Number of samples.
        size: Texts in a sample, drawn with replacement.
    """

    info: TaskInfo
    texts: Sequence[tuple[str, str]]
    runs: int = EXPERIMENTS
    size: int = CLUSTERED_TEXTS

    @classmethod
    def read(cls, file: str | os.PathLike[str], name: str | None = None) -> ClusteringTask:
        """Reads a file of `read_labelled`."""
        path = Path(file)
        labelled = read_labelled(path)
        check_classes(path, labelled)
        files = [path, path.with_name("labels.txt")] if path.suffix == ".txt" else [path]
        info = _info(path, name, "Clustering", "v_measure", files)
        return cls(info, [(text, label) for _, text, label in labelled])

    def run(self, encoder: Encoder) -> Outcome:
        """Measures an encoder; drawn are texts in their clusters, and runs of k-means."""
        vectors = encoder.encode([text for text, _ in self.texts])
        labels = np.array([label for _, label in self.texts])
        runs = [
            v_measure_statistic(labels[drawn], clusters, drawn, len(labels))
            for drawn, clusters in clusterings(
                vectors,
                labels,
                random.Random(SEED),  # noqa: S311
                self.runs,
                self.size,
            )
        ]
        return Outcome.of(over_runs(len(labels), runs))

    def halves(self, seed: int = 0) -> tuple[ClusteringTask, ClusteringTask]:
        """Two disjoint random halves of the texts."""
        first, second = _halves(len(self.texts), seed)
        return (
            replace(self, info=_half(self.info, 1), texts=[self.texts[i] for i in first]),
            replace(self, info=_half(self.info, 2), texts=[self.texts[i] for i in second]),
        )


def clusterings(
    vectors: Vectors,
    labels: NDArray[np.str_],
    rng: random.Random,
    runs: int = EXPERIMENTS,
    size: int = CLUSTERED_TEXTS,
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Clusters of samples with replacement, as MTEB draws them.

    Returns:
        Of each sample the drawn texts and their clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    found = []
    for _ in range(runs):
        drawn = np.array(rng.choices(range(len(vectors)), k=size))
        kmeans = MiniBatchKMeans(
            len(np.unique(labels)), batch_size=512, init="k-means++", n_init=1, random_state=SEED
        )
        found.append((drawn, kmeans.fit_predict(vectors[drawn]).astype(np.int64)))
    return found


def _few_of_each(labels: NDArray[np.str_], repetitions: int) -> list[list[int]]:
    """MTEB's training samples: shuffled again and again from the same seed."""
    order = list(range(len(labels)))
    draws = []
    for _ in range(repetitions):
        np.random.RandomState(SEED).shuffle(order)
        counts: dict[str, int] = {}
        drawn = []
        for i in order:
            label = str(labels[i])
            if counts.get(label, 0) < SAMPLES_PER_LABEL:
                counts[label] = counts.get(label, 0) + 1
                drawn.append(i)
        draws.append(drawn)
    return draws


def _top(scores: NDArray[np.float32], ids: NDArray[np.str_], k: int) -> list[str]:
    """Ids of the k best documents; ties in descending order of the id, as in trec_eval."""
    k = min(k, len(scores))
    bound = np.partition(scores, -k)[-k]
    candidates = np.flatnonzero(scores >= bound)
    best = sorted(((scores[i], str(ids[i])) for i in candidates), reverse=True)[:k]
    return [key for _, key in best]


def _table(folder: Path, name: str) -> Path:
    for suffix in (".csv", ".tsv", ".csv.gz", ".tsv.gz"):
        if os.path.isfile(folder / f"{name}{suffix}"):
            return folder / f"{name}{suffix}"
    raise DataError(f"a classification folder must hold {name}.csv or {name}.tsv, got {folder}")


def _info(
    path: Path, name: str | None, task_type: str, metric: str, files: Sequence[Path]
) -> TaskInfo:
    for file in files:
        if not os.path.isfile(file):
            raise DataError(f"the file must exist, got {file}")
    stem = path.name.split(".")[0] if os.path.isfile(path) else path.resolve().name
    split = next((part for part in ("test", "dev", "train") if part in stem), "all")
    return TaskInfo(
        name or stem,
        task_type,
        stem,
        split,
        metric,
        file_revision(*files),
        f"st-embfilter {version('st-embfilter')}",
    )


def _halves(n: int, seed: int) -> tuple[list[int], list[int]]:
    if n < 4:
        raise DataError(f"a task must have at least 4 units to be cut into halves, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    return sorted(order[: n // 2].tolist()), sorted(order[n // 2 :].tolist())


def _half(info: TaskInfo, number: int) -> TaskInfo:
    return replace(info, split=f"{info.split} (half {number})")

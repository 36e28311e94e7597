"""Storage x quality x speed: one model's vectors in FAISS indexes of every width and precision.

Needs the extra `eval`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import quantize_embeddings

from st_embfilter.errors import DataError
from st_embfilter.evaluation.data import beir_files, read_corpus, read_judgements, read_texts
from st_embfilter.evaluation.metrics import ndcg_of_gains
from st_embfilter.evaluation.vectors import Vectors
from st_embfilter.spectrum.unit import unit_rows

PRECISIONS: Final = ("float32", "int8", "binary")
KINDS: Final = ("flat", "hnsw")
RATIOS: Final = (1, 2, 4, 8)
TOP: Final = 10

#: Links of each vector in an HNSW graph, and candidates of a search in it.
_LINKS: Final = 32
_CANDIDATES: Final = 64

#: Of a plain file of texts, each so many-th is a query.
_EVERY: Final = 50


@dataclass(frozen=True)
class StorageRow:
    """One index.

    Attributes:
        dims: Width of the embeddings.
        precision: "float32", "int8" or "binary", as in `SentenceTransformer.encode`.
        kind: "flat" (exact) or "hnsw".
        vectors: Number of indexed vectors.
        index_bytes: Size of the serialised index.
        milliseconds: Time of one query on one thread, median over repetitions.
        recall: Share of the ten nearest of the widest exact float32 index that are found.
        ndcg: nDCG@10 against judgements, None without them.
    """

    dims: int
    precision: str
    kind: str
    vectors: int
    index_bytes: int
    milliseconds: float
    recall: float
    ndcg: float | None


def storage_table(
    documents: Vectors,
    queries: Vectors,
    *,
    dims: Sequence[int] | None = None,
    precisions: Sequence[str] = PRECISIONS,
    kinds: Sequence[str] = KINDS,
    gains: Sequence[Mapping[int, float]] | None = None,
    repetitions: int = 5,
) -> list[StorageRow]:
    """Builds and searches every index.

    Args:
        documents: (n, d) vectors in nested order: the first k' dimensions are a smaller filter.
        queries: (m, d).
        dims: Widths; None for d, d/2, d/4 and d/8.
        precisions: Names out of `PRECISIONS`.
        kinds: Names out of `KINDS`.
        gains: For each query, gains of the documents (by row) that are judged relevant.
        repetitions: Searches of all queries that the time is the median of.

    Returns:
        A row for each width, precision and kind; binary only for widths that fill bytes.

    Raises:
        DataError: If FAISS is missing, there are fewer than ten documents, or a width does not fit.
    """
    faiss = _faiss()
    if len(documents) < TOP or not len(queries):
        raise DataError(
            f"a comparison needs {TOP} documents and a query at least, got {len(documents)} and "
            f"{len(queries)}"
        )
    d = documents.shape[1]
    widths = list(dict.fromkeys(max(1, d // ratio) for ratio in RATIOS)) if dims is None else dims
    if any(not 1 <= width <= d for width in widths):
        raise DataError(f"widths must be in [1, {d}], got {list(widths)}")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        reference = _Index(faiss, "float32", "flat", unit_rows(documents)).search(queries)
        rows = []
        for width in widths:
            stored, asked = unit_rows(documents[:, :width]), queries[:, :width]
            for precision in precisions:
                if precision == "binary" and width % 8:
                    continue
                for kind in kinds:
                    index = _Index(faiss, precision, kind, stored)
                    seconds, found = _timed(index, asked, repetitions)
                    rows.append(
                        StorageRow(
                            width,
                            precision,
                            kind,
                            len(stored),
                            index.size,
                            1000 * seconds / len(asked),
                            _recall(found, reference),
                            None if gains is None else _ndcg(found, gains),
                        )
                    )
    finally:
        faiss.omp_set_num_threads(threads)
    return rows


@dataclass(frozen=True)
class Collection:
    """Texts to index and to ask.

    Attributes:
        documents: Texts that are indexed.
        queries: Texts that are asked.
        gains: For each query, gains of the documents (by row), or None.
    """

    documents: list[str]
    queries: list[str]
    gains: list[dict[int, float]] | None = None

    @classmethod
    def of_beir(cls, folder: str | os.PathLike[str], split: str = "test") -> Collection:
        """A BEIR folder."""
        files = beir_files(folder, split)
        documents, queries = read_corpus(files[0]), read_corpus(files[1])
        judged = read_judgements(files[2], queries, documents)
        rows = {key: row for row, key in enumerate(documents)}
        return cls(
            list(documents.values()),
            [queries[query] for query in judged],
            [{rows[key]: float(gain) for key, gain in g.items()} for g in judged.values()],
        )

    @classmethod
    def of_texts(cls, file: str | os.PathLike[str]) -> Collection:
        """A file of texts, one on a line; every 50th asks instead of being indexed."""
        texts = read_texts(file)
        documents = [text for i, text in enumerate(texts) if i % _EVERY]
        return cls(documents, texts[::_EVERY])


class _Index:
    """A FAISS index over what `encode(precision=...)` gives."""

    def __init__(self, faiss: Any, precision: str, kind: str, documents: Vectors) -> None:
        width = documents.shape[1]
        product = faiss.METRIC_INNER_PRODUCT
        hnsw = kind == "hnsw"
        self._faiss = faiss
        self._precision = precision
        if precision == "binary":
            self.index = (
                faiss.IndexBinaryHNSW(width, _LINKS) if hnsw else faiss.IndexBinaryFlat(width)
            )
            stored = quantize_embeddings(documents, "ubinary")
        elif precision == "int8":
            scalar = faiss.ScalarQuantizer.QT_8bit
            self.index = (
                faiss.IndexHNSWSQ(width, scalar, _LINKS, product)
                if hnsw
                else faiss.IndexScalarQuantizer(width, scalar, product)
            )
            self.index.train(documents)
            ranges = np.stack([documents.min(axis=0), documents.max(axis=0)])
            codes = np.asarray(quantize_embeddings(documents, "int8", ranges=ranges))
            # The middle of each code's interval, which FAISS stores as that code again.
            share = (codes.astype(np.float32) + 128.5) / 255
            stored = (ranges[0] + share * (ranges[1] - ranges[0])).astype(np.float32)
        else:
            self.index = (
                faiss.IndexHNSWFlat(width, _LINKS, product) if hnsw else faiss.IndexFlatIP(width)
            )
            stored = documents
        if hnsw:
            self.index.hnsw.efSearch = _CANDIDATES
        self.index.add(np.ascontiguousarray(stored))

    @property
    def size(self) -> int:
        """Bytes of the serialised index."""
        binary = self._precision == "binary"
        write = self._faiss.serialize_index_binary if binary else self._faiss.serialize_index
        return int(write(self.index).nbytes)

    def search(self, queries: Vectors) -> NDArray[np.int64]:
        """Rows (m, 10) of the nearest documents, best first."""
        binary = self._precision == "binary"
        asked = quantize_embeddings(queries, "ubinary") if binary else queries
        found: NDArray[np.int64] = self.index.search(np.ascontiguousarray(asked), TOP)[1]
        return found


def _timed(index: _Index, queries: Vectors, repetitions: int) -> tuple[float, NDArray[np.int64]]:
    found = index.search(queries)
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        index.search(queries)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def _recall(found: NDArray[np.int64], reference: NDArray[np.int64]) -> float:
    shared = [len(set(a) & set(b)) for a, b in zip(found.tolist(), reference.tolist(), strict=True)]
    return sum(shared) / reference.size


def _ndcg(found: NDArray[np.int64], gains: Sequence[Mapping[int, float]]) -> float:
    values = [
        ndcg_of_gains([judged.get(row, 0.0) for row in rows], list(judged.values()), TOP)
        for rows, judged in zip(found.tolist(), gains, strict=True)
    ]
    return float(np.mean(values))


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise DataError(
            "indexes need FAISS; install the extra with pip install 'st-embfilter[eval]'"
        ) from error
    return faiss

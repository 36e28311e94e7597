"""Texts that come along to try a filter on: paraphrases, with near misses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from st_embfilter.errors import FormatError
from st_embfilter.evaluation.metrics import (
    Floats,
    ndcg_at_k,
    pair_average_precision,
    v_measure,
)
from st_embfilter.spectrum.unit import unit_rows
from st_embfilter.text import read_json

#: In a checkout.
DEMO_TEXTS: Final = Path(__file__).resolve().parents[2] / "examples" / "data" / "paraphrases.jsonl"
#: Where an installed wheel carries the texts.
_INSTALLED_TEXTS: Final = Path(__file__).resolve().parents[1] / "data" / "paraphrases.jsonl"

SHOWN_TEXTS: Final = (
    "Photosynthesis turns sunlight into sugar.",
    "The central bank raised interest rates to slow inflation.",
    "The goalkeeper saved a penalty in the last minute.",
)


def demo_texts() -> Path:
    """The file of the project's own texts, in a checkout or an installed wheel."""
    return DEMO_TEXTS if DEMO_TEXTS.is_file() else _INSTALLED_TEXTS


@dataclass(frozen=True)
class Paraphrases:
    """Groups of texts that mean the same, with near misses.

    Attributes:
        texts: All texts: of each group its paraphrases, then its distractors.
        groups: (n,) group of each text.
        topics: (n,) topic of each text.
        is_paraphrase: (n,) False for distractors.
    """

    texts: list[str]
    groups: NDArray[np.int64]
    topics: NDArray[np.int64]
    is_paraphrase: NDArray[np.bool_]

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Paraphrases:
        """Reads JSON Lines with the keys topic, paraphrases and distractors.

        Raises:
            FormatError: Names the file and the line.
        """
        texts: list[str] = []
        groups: list[int] = []
        names: list[str] = []
        kinds: list[bool] = []
        for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
            record = _record(file, number, line)
            for key in ("paraphrases", "distractors"):
                for text in record[key]:
                    texts.append(text)
                    groups.append(number)
                    names.append(record["topic"])
                    kinds.append(key == "paraphrases")
        if not texts:
            raise FormatError(f"{file} must hold at least one group of texts, got an empty file")
        topics = np.unique(names, return_inverse=True)[1].astype(np.int64)
        return cls(texts, np.array(groups), topics, np.array(kinds))

    def scores(self, embeddings: Floats) -> dict[str, float]:
        """Retrieval (nDCG@10), pairs (average precision) and clustering (v-measure), x 100.

        Args:
            embeddings: (n, d), one row for each of `texts`.
        """
        unit = unit_rows(embeddings.astype(np.float64))
        cosine = unit @ unit.T
        same = self.groups[:, None] == self.groups[None, :]
        both = self.is_paraphrase[:, None] & self.is_paraphrase[None, :]
        relevant = same & both & ~np.eye(len(self.texts), dtype=bool)
        others = np.where(np.eye(len(self.texts), dtype=bool), -np.inf, cosine)
        queries = self.is_paraphrase
        pairs = [
            (i, j)
            for group in np.unique(self.groups)
            for i, j in combinations(np.flatnonzero(self.groups == group), 2)
            if self.is_paraphrase[i]
        ]
        left, right = np.array(pairs).T
        return {
            "retrieval": 100 * float(ndcg_at_k(others[queries], relevant[queries]).mean()),
            "pairs": 100 * pair_average_precision(cosine[left, right], self.is_paraphrase[right]),
            "clustering": 100 * v_measure(unit[queries], self.topics[queries]),
        }


def _record(file: str | os.PathLike[str], number: int, line: str) -> dict[str, Any]:
    record: dict[str, Any] = read_json(line, f"{file}, line {number}:", FormatError)
    keys = {"topic": str, "paraphrases": list, "distractors": list}
    if any(not isinstance(record.get(key), kind) for key, kind in keys.items()):
        raise FormatError(
            f"{file}, line {number}: must be an object with topic (text), paraphrases and "
            f"distractors (lists), got {line[:60]!r}"
        )
    if len(record["paraphrases"]) < 2 or not record["distractors"]:
        raise FormatError(
            f"{file}, line {number}: a group needs two paraphrases and one distractor at least, "
            f"got {len(record['paraphrases'])} and {len(record['distractors'])}"
        )
    return record

"""Measures the bundled language model on STS-B: `python -m model_cards.measure stsb-en-test.csv`.

The file is the test split of the STS benchmark as CSV without a header: two sentences and a score
from 0 to 5. Writes openstax-lm-embfilter.jsonl, from which `make model-cards` renders the card.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

import st_embfilter
from model_cards.render import DEMO_LM, MEASURED
from st_embfilter.card import Score
from st_embfilter.layer import filter_of
from st_embfilter.metrics import spearman, unit_rows

COMMAND = "python -m model_cards.measure stsb-en-test.csv"


def main(file: str) -> None:
    """Encodes every sentence once, without filter, and filters in memory."""
    with Path(file).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    gold = np.array([float(row[2]) for row in rows])
    model = st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False)
    layer = filter_of(model)
    projection = layer.projection.double().numpy()
    backbone = SentenceTransformer(modules=list(model)[:2], device="cpu")
    first, second = (backbone.encode([row[i] for row in rows]).astype(np.float64) for i in (0, 1))

    def score(configuration: str, dims: int, raw: float | None) -> Score:
        matrix = np.eye(layer.in_features) if configuration == "raw" else projection[:dims]
        cosines = np.sum(unit_rows(first @ matrix.T) * unit_rows(second @ matrix.T), axis=1)
        value = round(spearman(cosines, gold), 6)
        delta = None if raw is None else round(value - raw, 6)
        return Score("STSBenchmark", "STS-B", "test", "cosine_spearman", dims, value,
                     configuration, delta=delta, command=COMMAND)  # fmt: skip

    raw = score("raw", layer.in_features, None)
    kept = [score("bulk", layer.in_features // ratio, raw.score) for ratio in (2, 4, 8)]
    lines = [
        json.dumps({key: value for key, value in asdict(one).items() if value is not None})
        for one in (raw, *kept)
    ]
    MEASURED.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

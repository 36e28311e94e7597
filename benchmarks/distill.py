"""Distils static models with model2vec and embeds texts with them, for `benchmarks/static.py`.

Runs in an environment of its own, with `pip install 'model2vec[distill]'`, and imports nothing of
this project. The language model reads the tokens once, for all numbers of dimensions.

    python benchmarks/distill.py LLM TEXTS.json OUTPUT --dims 288 --dims 256 [--no-blocks]

Writes OUTPUT/DIMS.npy, a row for each of the texts, which are a list in JSON. With --no-blocks the
language model is its token embeddings and its final norm.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from model2vec.distill import distillation
from torch.nn import ModuleList
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dims", type=int, action="append", required=True)
    parser.add_argument("--no-blocks", action="store_true")
    options = parser.parse_args()
    texts = json.loads(options.texts.read_text(encoding="utf-8"))
    read = distillation.create_embeddings
    states = options.output / "tokens.npy"

    def once(**arguments: Any) -> np.ndarray:
        if not states.is_file():
            np.save(states, read(**arguments))
        return np.load(states)

    distillation.create_embeddings = once
    for dims in options.dims:
        model = AutoModel.from_pretrained(options.model)
        if options.no_blocks:
            model.layers = ModuleList()
        static = distillation.distill_from_model(
            model,
            AutoTokenizer.from_pretrained(options.model),
            device="cpu",
            pca_dims=dims,
        )
        vectors = static.encode(texts, max_length=None, use_multiprocessing=False)
        np.save(options.output / f"{dims}.npy", np.asarray(vectors, dtype=np.float32))


if __name__ == "__main__":
    main()

"""Compares baked GGUF files in llama.cpp with the torch model that they come from.

`python -m compat.llama_cpp MODEL.gguf --reference FOLDER --node FOLDER`: the reference is a
transformers checkpoint of the same weights, the node folder one in which `npm install
node-llama-cpp` was run. Prints one JSON object; docs/llama-cpp.md says what it holds.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import st_embfilter
from st_embfilter.evaluation.tasks import STSTask
from st_embfilter.saved import gguf_out
from st_embfilter.saved.gguf_out import POOLING_TYPES, export_gguf
from st_embfilter.unembedding.gguf import GGUFFile, GGUFTensor

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_suffix(".mjs")
PROSE = ROOT / "README.md"
PROMPTS = ["The capital of France is", "Photosynthesis is the process by which"]
KINDS = ("f32", "f16", "q8_0")


def fifty_texts() -> list[str]:
    lines = (ROOT / "examples" / "data" / "paraphrases.jsonl").read_text(encoding="utf-8")
    texts: list[str] = []
    for line in lines.splitlines():
        texts += _strings(json.loads(line))
    return texts[:50]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _strings(item)]


def unbaked(source: Path, target: Path, kind: str, pooling: str = "mean") -> None:
    """The same model without a rotation, its matrices stored as in a baked file."""
    file = GGUFFile.open(source)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    values, size = gguf.GGML_QUANT_SIZES[stored]

    def plan(tensor: GGUFTensor) -> gguf_out._Plan:
        if len(tensor.shape) == 1:
            rows = gguf_out._bytes_of(file, tensor)
            return gguf_out._Plan(tensor.name, tensor.shape, tensor.kind, tensor.nbytes, rows)
        rows = gguf_out._quantized((file.rows(tensor) for _ in range(1)), stored)
        nbytes = math.prod(tensor.shape) // values * size
        return gguf_out._Plan(tensor.name, tensor.shape, int(stored), nbytes, rows)

    with target.open("wb") as out:
        keys = {
            "general.file_type": gguf_out._FILE_TYPES[kind],
            f"{file.metadata['general.architecture']}.pooling_type": POOLING_TYPES[pooling],
        }
        gguf_out._write(out, file, keys, map(plan, file.tensors.values()))


class LlamaCpp:
    """llama.cpp, through node-llama-cpp."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, model: Path, **asked: Sequence[str]) -> dict[str, Any]:
        """Embeds, continues and scores texts with a GGUF file."""
        with tempfile.TemporaryDirectory() as place:
            given, got = Path(place) / "in.json", Path(place) / "out.json"
            given.write_text(json.dumps(asked), encoding="utf-8")
            command = ["node", str(SCRIPT), str(model.absolute()), str(given), str(got)]
            subprocess.run(command, cwd=self.folder, check=True)
            result: dict[str, Any] = json.loads(got.read_text(encoding="utf-8"))
            return result


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def perplexity(result: dict[str, Any]) -> float:
    (score,) = result["score"]
    return math.exp(-score["logLikelihood"] / score["tokens"])


class Vectors:
    """An encoder that knows its texts."""

    def __init__(self, texts: list[str], vectors: np.ndarray) -> None:
        self.places = {text: i for i, text in enumerate(texts)}
        self.vectors = vectors

    def encode(self, texts: list[str], **options: object) -> np.ndarray:
        """The vectors of texts."""
        return self.vectors[[self.places[text] for text in texts]]


def comparison(
    found: dict[str, Any], expected: np.ndarray, tokens: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Embeddings and tokens of llama.cpp against those of the torch model."""
    vectors = np.array(found["embed"][: len(expected)])
    entry = {"cosine min": float(cosines(vectors, expected).min())}
    for ratio in (2, 4, 8):
        k = expected.shape[1] // ratio
        entry[f"cosine min, first {k}"] = float(cosines(vectors[:, :k], expected[:, :k]).min())
    pairs = zip(tokens, found["tokens"], strict=False)
    entry["texts with other tokens"] = sum(list(a) != b for a, b in pairs)
    return entry


def language(found: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the language model writes and how likely it finds a text, before and after."""
    pieces = list(zip(found["continue"], before["continue"], strict=True))
    return {
        "perplexity before": perplexity(before),
        "perplexity": perplexity(found),
        "same 40 tokens": [a["tokens"] == b["tokens"] for a, b in pieces],
        "text": [a["text"] for a, _ in pieces],
    }


def sts_scores(task: STSTask, pairs: list[str], *vectors: np.ndarray) -> dict[str, list[float]]:
    """Scores of every width, ours first."""
    widths = [vectors[0].shape[1] // ratio for ratio in (1, 2, 4, 8)]
    return {
        f"STS at {k}, ours and llama.cpp": [
            100 * task.run(Vectors(pairs, one[:, :k])).score for one in vectors
        ]
        for k in widths
    }


def of_torch(reference: str, pooling: str) -> Any:
    """The torch model whose full width a baked file has."""
    return st_embfilter.from_causal_lm(
        reference,
        norm="folded",
        pooling=pooling,
        keep=1.0,
        device="cpu",
        dtype="float32",
        show_progress_bar=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--sts", type=Path, help="pairs to compare scores on")
    parser.add_argument("--kinds", default=",".join(KINDS))
    given = parser.parse_args()
    llama = LlamaCpp(given.node)
    texts = fifty_texts()
    task = None if given.sts is None else STSTask.read(given.sts)
    pairs = [] if task is None else sorted({text for pair in task.pairs for text in pair[:2]})
    prose = {"continue": PROMPTS, "score": [PROSE.read_text(encoding="utf-8")]}
    report: dict[str, Any] = {"model": given.model.name}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        for pooling in ("mean", "lasttoken"):
            ours = of_torch(given.reference, pooling)
            mean = pooling == "mean"
            asked = texts + (pairs if mean else [])
            expected = ours.encode(asked)
            tokens = [ours.tokenizer(text)["input_ids"] for text in texts]
            for kind in given.kinds.split(","):
                unbaked(given.model, file, kind)
                before = llama.run(file, **prose) if mean else {}
                export_gguf(given.model, file, pooling=pooling, kind=kind, overwrite=True)
                found = llama.run(file, embed=asked, **(prose if mean else {}))
                entry = comparison(found, expected[: len(texts)], tokens)
                entry["MB"] = file.stat().st_size / 1e6
                if mean:
                    entry |= language(found, before)
                if mean and task is not None:
                    theirs = np.array(found["embed"][len(texts) :])
                    entry |= sts_scores(task, pairs, expected[len(texts) :], theirs)
                report["llama.cpp"] = found["release"]
                report[f"{pooling} {kind}"] = entry
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

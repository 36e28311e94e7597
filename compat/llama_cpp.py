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
from st_embfilter.saved.gguf_out import export_gguf
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


def unbaked(source: Path, target: Path, kind: str) -> None:
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
        keys = {"general.file_type": gguf_out._FILE_TYPES[kind]}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--baked", type=Path, help="folder that keeps the baked files")
    parser.add_argument("--sts", type=Path, help="pairs to compare scores on")
    parser.add_argument("--kinds", default=",".join(KINDS))
    given = parser.parse_args()
    llama = LlamaCpp(given.node)
    texts = fifty_texts()
    task = None if given.sts is None else STSTask.read(given.sts)
    pairs = [] if task is None else sorted({text for pair in task.pairs for text in pair[:2]})
    prose = [PROSE.read_text(encoding="utf-8")]
    original = llama.run(given.model, **{"continue": PROMPTS}, score=prose)
    report: dict[str, Any] = {"model": given.model.name, "llama.cpp": original["release"]}
    report["perplexity of the given file"] = perplexity(original)
    with tempfile.TemporaryDirectory() as place:
        folder = given.baked or Path(place)
        before = {}
        for kind in given.kinds.split(","):
            plain = folder / f"{given.model.stem}-{kind}.gguf"
            unbaked(given.model, plain, kind)
            before[kind] = llama.run(plain, **{"continue": PROMPTS}, score=prose)
            plain.unlink()
        for pooling in ("mean", "lasttoken"):
            ours = st_embfilter.from_causal_lm(
                given.reference,
                norm="folded",
                pooling=pooling,
                keep=1.0,
                device="cpu",
                dtype="float32",
                show_progress_bar=False,
            )
            expected = ours.encode(texts)
            with_pairs = pairs and pooling == "mean"
            expected_pairs = ours.encode(pairs) if with_pairs else None
            for kind in given.kinds.split(","):
                file = folder / f"{given.model.stem}-{pooling}-{kind}.gguf"
                if not file.exists():
                    export_gguf(given.model, file, pooling=pooling, kind=kind)
                asked: dict[str, Any] = {"embed": texts + (pairs if with_pairs else [])}
                if pooling == "mean":
                    asked |= {"continue": PROMPTS, "score": prose}
                result = llama.run(file, **asked)
                found = np.array(result["embed"][:50])
                same = cosines(found, expected)
                entry = {"cosine min": float(same.min()), "MB": file.stat().st_size / 1e6}
                for ratio in (2, 4, 8):
                    k = expected.shape[1] // ratio
                    least = float(cosines(found[:, :k], expected[:, :k]).min())
                    entry[f"cosine min, first {k}"] = least
                tokens = [ours.tokenizer(text)["input_ids"] for text in texts]
                entry["texts with other tokens"] = sum(
                    a != b for a, b in zip(tokens, result["tokens"][:50], strict=True)
                )
                if pooling == "mean":
                    entry["perplexity before"] = perplexity(before[kind])
                    entry["perplexity"] = perplexity(result)
                    pieces = list(zip(result["continue"], before[kind]["continue"], strict=True))
                    entry["same 40 tokens"] = [a["tokens"] == b["tokens"] for a, b in pieces]
                    entry["text"] = [a["text"] for a, _ in pieces]
                if task is not None and expected_pairs is not None:
                    theirs = np.array(result["embed"][50:])
                    for ratio in (1, 2, 4, 8):
                        k = expected.shape[1] // ratio
                        scores = [
                            100 * task.run(Vectors(pairs, vectors[:, :k])).score
                            for vectors in (expected_pairs, theirs)
                        ]
                        entry[f"STS at {k}, ours and llama.cpp"] = scores
                report[f"{pooling} {kind}"] = entry
                print(json.dumps({f"{pooling} {kind}": entry}), flush=True)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

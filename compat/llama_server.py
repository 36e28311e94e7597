"""Baked GGUF files in the engine of llama-server, which the wheel `xllamacpp` brings to Python.

python -m compat.llama_server families                      # random models of four families
python -m compat.llama_server cache MODEL.gguf REFERENCE    # the last token, by type and by cache
python -m compat.llama_server sts MODEL.gguf REFERENCE PAIRS.csv [--pairs 200]   # scores by width

The wheel is no dependency of the project: `pip install xllamacpp` in an environment of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional

from compat.llama_cpp import Vectors, cosines, fifty_texts, of_torch, unbaked
from st_embfilter.evaluation.tasks import STSTask
from st_embfilter.model.baked import rotation_of
from st_embfilter.saved.gguf_out import export_gguf
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.gram import spectrum_of_weight
from tests.gguf_files import TOKENS, tiny_model, write_gguf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TYPES = ("f32", "f16", "q8_0")
WIDTHS = (1, 3 / 4, 1 / 2, 1 / 4, 1 / 8)
CACHES = ("cache f16", "cache f32")


class Server:
    """A GGUF file in the engine, one thread.

    Args:
        model: The file.
        context: Tokens.
        precise: Keys and values in float32 without flash attention, not the engine's default.
    """

    def __init__(self, model: Path, *, context: int = 1024, precise: bool = False) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path, given.embedding = str(model), True
        given.n_ctx, given.n_parallel, given.n_gpu_layers, given.verbosity = context, 1, 0, 0
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
        if precise:
            given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(given)

    def embed(self, texts: Sequence[str | list[int]]) -> np.ndarray:
        """Vectors (n, d) of texts, or of token ids."""
        answers = [
            self._server.handle_embeddings({"input": text, "model": "any"}) for text in texts
        ]
        return np.array([answer["data"][0]["embedding"] for answer in answers])


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """The smallest cosine over vectors and widths."""
    ends = [max(1, round(expected.shape[1] * width)) for width in WIDTHS]
    return min(float(cosines(found[:, :k], expected[:, :k]).min()) for k in ends)


def families() -> Iterator[tuple[str, str, str, float]]:
    """Random models: the baked file against the torch model, rotated by hand."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, len(TOKENS), 5 + 3 * i).tolist() for i in range(8)]
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "in.gguf", Path(place) / "out.gguf"
        for family in FAMILIES:
            model = tiny_model(family, tied=False)
            # llama.cpp's converter writes Mistral as llama.
            write_gguf(source, model, "llama" if family == "mistral" else family)
            gain = model.model.norm.weight.detach().double()
            head = model.lm_head.weight.detach().double()
            rotation = rotation_of(spectrum_of_weight(head * gain), Band("bulk"))
            with torch.inference_mode():
                states = [model.model(torch.tensor([row])).last_hidden_state[0] for row in ids]
            turned = [(state.double() / gain @ rotation.T).numpy() for state in states]
            pooled = {
                "mean": np.stack([state.mean(axis=0) for state in turned]),
                "lasttoken": np.stack([state[-1] for state in turned]),
            }
            for pooling, expected in pooled.items():
                for kind in TYPES:
                    export_gguf(source, target, kind=kind, pooling=pooling, overwrite=True)
                    found = Server(target, context=64, precise=True).embed(ids)
                    yield family, pooling, kind, worst(found, expected)


@contextmanager
def rounded(what: set[str]) -> Iterator[None]:
    """Attention in torch with keys, values or both rounded as llama.cpp's cache rounds them."""
    exact = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        key = key.half().float() if "key" in what else key
        value = value.half().float() if "value" in what else value
        return exact(query, key, value, *args, **options)

    with mock.patch.object(functional, "scaled_dot_product_attention", attention):
        yield


def cache(model: Path, reference: str) -> Iterator[tuple[str, str, float]]:
    """The last token of fifty texts: in torch with a rounded cache, and by file and cache."""
    texts = fifty_texts()
    ours = of_torch(reference, "lasttoken")
    expected = ours.encode(texts)
    for what in ({"key"}, {"value"}, {"key", "value"}):
        with rounded(what):
            found = ours.encode(texts)
        name = f"torch, each {' and '.join(sorted(what))} in f16"
        yield name, "", float(cosines(found, expected).min())
    backbone = SentenceTransformer(modules=list(ours.children())[:2], device="cpu")
    plain = backbone.encode(texts)
    del ours, backbone
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        unbaked(model, file, "f32", "lasttoken")
        for precise in (False, True):
            found = Server(file, precise=precise).embed(texts)
            yield "f32, not rotated", CACHES[precise], float(cosines(found, plain).min())
        for kind, blocks in (("f32", 0), ("f16", 6), ("f16", 0)):
            export_gguf(
                model, file, pooling="lasttoken", kind=kind, float32_blocks=blocks, overwrite=True
            )
            for precise in (False, True):
                found = Server(file, precise=precise).embed(texts)
                name = f"{kind}, first {blocks} blocks f32" if blocks else kind
                yield name, CACHES[precise], float(cosines(found, expected).min())


def sts(model: Path, reference: str, pairs: Path, count: int) -> Iterator[tuple[str, ...]]:
    """Spearman x 100 of torch and of each type at every width, mean pooling."""
    task = STSTask.read(pairs)
    task = task if count == 0 else STSTask(task.info, task.pairs[:count])
    texts = sorted({text for pair in task.pairs for text in pair[:2]})
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        vectors = {"torch": of_torch(reference, "mean").encode(texts)}
        for kind in ("f16", "q8_0"):
            export_gguf(model, file, kind=kind, overwrite=True)
            vectors[kind] = Server(file).embed(texts)
        for name, found in vectors.items():
            ends = [round(found.shape[1] * width) for width in WIDTHS]
            scores = [100 * task.run(Vectors(texts, found[:, :k])).score for k in ends]
            yield (name, *(f"{score:.2f}" for score in scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("families", "cache", "sts"))
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("reference", nargs="?", help="transformers checkpoint of the same weights")
    parser.add_argument("pairs", type=Path, nargs="?")
    parser.add_argument("--pairs", type=int, default=0, dest="count", help="only the first N")
    given = parser.parse_args()
    if given.what == "families":
        rows: Iterator[tuple[Any, ...]] = families()
    elif given.what == "cache":
        rows = cache(given.model, given.reference)
    else:
        rows = sts(given.model, given.reference, given.pairs, given.count)
    for row in rows:
        print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()

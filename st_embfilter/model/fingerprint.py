"""One hash of everything that a model's embeddings depend on."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor


def fingerprint(model: SentenceTransformer) -> str:
    """Hash of everything that an embedding depends on: weights, tokenizer, settings, libraries."""
    digest = hashlib.sha256()
    for package in ("sentence-transformers", "transformers"):
        digest.update(f"{package} {version(package)}\n".encode())
    settings: list[object] = [
        [
            type(module).__module__,
            type(module).__qualname__,
            getattr(module, "get_config_dict", dict)(),
            getattr(module, "max_seq_length", None),
        ]
        for module in model.children()
    ]
    shared = [model.prompts, model.default_prompt_name, model.truncate_dim]
    digest.update(json.dumps([settings, shared], sort_keys=True, default=repr).encode())
    digest.update(_tokenizer(model).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _tokenizer(model: SentenceTransformer) -> str:
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        return repr(tokenizer)
    # Truncation and padding are what the last call left behind.
    content = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    sides = [getattr(tokenizer, name, None) for name in ("padding_side", "pad_token")]
    return json.dumps([content, *sides], sort_keys=True)


def _bytes(value: Tensor) -> memoryview:
    flat: NDArray[np.uint8] = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return flat.data

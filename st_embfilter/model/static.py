"""A language model with no layers at all: a table of filtered token embeddings.

The mean over tokens commutes with every affine map, so final norm, filter and calibration fold into
one table (V, k), which sentence-transformers loads as `StaticEmbedding`.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding, Transformer
from tokenizers import Tokenizer
from torch import Tensor

from st_embfilter.errors import DepthError
from st_embfilter.model.depth import TOKEN_WEIGHTS
from st_embfilter.model.metadata import FilterMetadata

_TOKENS_AT_A_TIME: Final = 4096
_METADATA: Final = "embfilter_metadata"


def check_static(recipe: object, pooling: str | None) -> None:
    """Checks what a model without blocks cannot have.

    Raises:
        DepthError: If there is a prompt, or another pooling than the mean.
    """
    if recipe is not None or pooling not in (None, "mean"):
        raise DepthError(
            "layers=0 is the mean over a text's tokens, so it takes no prompt and no other "
            f"pooling, got prompt {recipe!r} and pooling {pooling!r}; use layers=1"
        )


def token_embeddings(backbone: Transformer, token_weights: str | None = None) -> StaticEmbedding:
    """The embeddings of all tokens after the final norm, as a module that takes their mean.

    Special tokens, BOS among them, are in no mean: the tokenizer adds none, and reads their names
    in a text as any other words. Rows beyond the tokenizer's vocabulary are left out, and a token
    without a row counts as zeros.

    Args:
        backbone: A model with no blocks, see `cut_model`.
        token_weights: None or a key of `TOKEN_WEIGHTS`.

    Raises:
        DepthError: If the model cannot run without blocks, adds positions, or has no fast
            tokenizer; or the weights are unknown.
    """
    if token_weights is not None and token_weights not in TOKEN_WEIGHTS:
        raise DepthError(
            f"token_weights must be None or one of {', '.join(TOKEN_WEIGHTS)}, got "
            f"{token_weights!r}"
        )
    tokenizer = bag_tokenizer(backbone.tokenizer)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    model: Any = backbone.auto_model
    rows = min(size, model.get_input_embeddings().weight.shape[0])

    def states(ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        found: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return found.to("cpu", torch.float32)

    with torch.no_grad():
        try:
            twice = states(torch.tensor([[rows - 1, rows - 1]]))[0]
        except Exception as error:  # models fail in many ways without blocks
            raise DepthError(
                "layers=0 needs a model that runs without blocks, got "
                f"{type(model).__name__}: {error}; use layers=1"
            ) from error
        if not torch.equal(twice[0], twice[1]):
            raise DepthError(
                "layers=0 needs a model whose first block receives the token embedding alone, got "
                f"{type(model).__name__}, which adds the position; use layers=1"
            )
        table = torch.zeros(size, twice.shape[1])
        for ids in torch.arange(rows).split(_TOKENS_AT_A_TIME):
            table[ids] = states(ids[:, None])[:, 0]
    if token_weights is not None:
        table *= TOKEN_WEIGHTS[token_weights](_ranks(backbone.tokenizer, size))[:, None]
    return StaticEmbedding(tokenizer, embedding_weights=table)


def fold(model: SentenceTransformer, dtype: torch.dtype | str | None = None) -> SentenceTransformer:
    """The same model with its filter folded into the table of tokens.

    Args:
        model: `StaticEmbedding`, `EmbedFilterLayer` and what follows it.
        dtype: Dtype of the new table, or its name; None and "auto" for float32. In float16 the
            table is scaled, see `float16_scale`.
    """
    if dtype is None or dtype == "auto":
        dtype = torch.float32
    chosen: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    modules: list[Any] = list(model.children())
    wide, layer, *rest = modules
    old: Tensor = wide.embedding.weight
    table = torch.empty(old.shape[0], layer.out_features, dtype=chosen)
    with torch.no_grad():
        for ids in torch.arange(len(old)).split(_TOKENS_AT_A_TIME):
            table[ids] = layer.linear(old[ids]).to("cpu", chosen)
        if chosen is torch.float16:
            table *= float16_scale(float(table.abs().max()))
    static = StaticEmbedding(wide.tokenizer, embedding_weights=table)
    setattr(static, _METADATA, layer.metadata)
    return SentenceTransformer(modules=[static, *rest], device=str(model.device))


def float16_scale(largest: float) -> float:
    """Power of two that a table is stored times in float16, so that the sum of a text is finite.

    A bag keeps the sum of its rows in the dtype of the table before it divides by their number.
    With entries of at most 1 that sum cannot pass float16's largest number, 65,504, before as many
    tokens. No cosine depends on the scale, but a classifier with a penalty on its weights does.

    Args:
        largest: Largest absolute entry of the table, not scaled.

    Returns:
        1 if that is at most 1.
    """
    return 2.0 ** -max(0, math.ceil(math.log2(largest))) if largest > 0 else 1.0


def scale_of(stored: Tensor, table: Tensor) -> float:
    """What a table seems to be stored times: `float16_scale` of a table that is known to rounding.

    Args:
        stored: (V, k), as stored.
        table: (V, k), what it should hold, not scaled.
    """
    if stored.dtype is not torch.float16:
        return 1.0
    largest = float(table.abs().max())  # by rounding it may be on either side of a power of two
    near = {float16_scale(largest * factor) for factor in (1 - 2**-9, 1 + 2**-9)}
    ratio = float(stored.to(torch.float64).norm() / table.norm())
    return min(near, key=lambda one: abs(one - ratio))


def bag_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer that adds no token, cuts nothing, and takes special tokens for plain words.

    Raises:
        DepthError: If it is no fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DepthError(
            f"layers=0 needs a fast tokenizer, got {type(tokenizer).__name__}; save it as "
            "tokenizer.json, or use layers=1"
        )
    content = json.loads(backend.to_str())
    content |= {"truncation": None, "padding": None, "post_processor": None}
    whole = Tokenizer.from_str(json.dumps(content))
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["special"]]
    bare = Tokenizer.from_str(json.dumps(content))
    # Ids of added tokens count on from the vocabulary: without some, others may move.
    ids = whole.get_vocab(with_added_tokens=True)
    moved = any(ids.get(t) != i for t, i in bare.get_vocab(with_added_tokens=True).items())
    return whole if moved else bare


def static_metadata(model: SentenceTransformer) -> FilterMetadata | None:
    """What the table of a static model was made from; None for other models."""
    return getattr(next(iter(model.children()), None), _METADATA, None)


def set_static_metadata(model: SentenceTransformer, metadata: FilterMetadata) -> None:
    """Says what the table of a static model was made from."""
    setattr(next(iter(model.children())), _METADATA, metadata)


def _ranks(tokenizer: Any, size: int) -> Tensor:
    """Rank of every token in the order of ids, special ones aside, which count as the first."""
    plain = torch.ones(size, dtype=torch.float64)
    special = torch.tensor([i for i in tokenizer.all_special_ids if i < size], dtype=torch.long)
    plain[special] = 0
    return (plain.cumsum(0) - 1).clamp(min=0).to(torch.float32)

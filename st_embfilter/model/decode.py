"""Samples of a language model, written many at once, as fast as a CPU can.

A step of many short texts is little more than the products with the weights. What `generate` adds
to them takes as long on small models: attention for one token as if there were many, and a sample
that passes some ten times over the logits of the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from st_embfilter.errors import CalibrationError

#: Logits that are drawn from at a time: float32 that stay in a processor's cache.
_CHUNK: Final = 2**20

#: Tokens of a block, of which the first draw takes one, and the second a token in it.
_BLOCK: Final = 128

#: Names of a model's cache in transformers, of now and before.
_CACHES: Final = ("cache", "past_key_values")

#: What torch's attention is left to deal with, or to refuse.
_OPTIONS: Final = ("position_bias", "softcap", "s_aux")

#: Name of `_attend` in transformers.
_ATTENTION: Final = "st_embfilter_decode"


@torch.inference_mode()
def write(model: Any, start: int, rows: int, length: int, pad: int) -> Tensor:
    """Samples texts at temperature 1, by torch's random state.

    Args:
        model: A causal language model. Of its `generation_config` only the ids that end a text are
            read: the other settings are a stranger's, and shape the texts.
        start: The first id of each.
        rows: Number of samples, all written at once.
        length: Most tokens after the first.
        pad: Id that follows an end.

    Returns:
        Ids (rows, <= 1 + length).

    Raises:
        CalibrationError: If the logits are not finite.
    """
    decode_fast(model)
    given = model.generation_config.eos_token_id
    ends = torch.tensor([] if given is None else given, dtype=torch.long, device=model.device)
    ids = torch.full((rows, 1), start, device=model.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    cache: dict[str, Any] = {}
    for _ in range(length):
        outputs = model(input_ids=ids[:, -1:] if cache else ids, use_cache=True, **cache)
        # A model without such a cache reads the whole text again.
        cache = {k: v for k, v in outputs.items() if k in _CACHES and v is not None}
        tokens = draw(outputs.logits[:, -1]).masked_fill_(ended, pad)
        del outputs
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        ended |= torch.isin(tokens, ends)
        if bool(ended.all()):
            break
    return ids


def draw(logits: Tensor) -> Tensor:
    """Draws a token for each row, at temperature 1: first a block of tokens, then one of it.

    Args:
        logits: (n, V), any floating dtype.

    Returns:
        (n,) ids.

    Raises:
        CalibrationError: If the logits are not finite.
    """
    wanted = torch.rand((2, len(logits), 1), device=logits.device)
    rows = max(1, _CHUNK // logits.shape[1])
    drawn = []
    for part, block_at, token_at in zip(
        logits.split(rows), wanted[0].split(rows), wanted[1].split(rows), strict=True
    ):
        chances = part.to(torch.float32).softmax(dim=-1)
        chances = nn.functional.pad(chances, (0, -chances.shape[1] % _BLOCK))
        blocks = chances.view(len(part), -1, _BLOCK)
        block = _pick(blocks.sum(dim=-1), block_at)
        token = _pick(blocks[torch.arange(len(part)), block], token_at)
        drawn.append(block * _BLOCK + token)
    return torch.cat(drawn)


def _pick(weights: Tensor, at: Tensor) -> Tensor:
    """The places (n,) that numbers (n, 1) in [0, 1) have in weights (n, m); none of weight 0."""
    places = weights.cumsum(dim=-1)
    whole = places[:, -1:]
    if not bool(whole.isfinite().all()):
        raise CalibrationError("a language model must give finite logits to sample from, got NaN")
    below = whole.nextafter(torch.zeros_like(whole))  # or rounding may reach past the last
    return torch.searchsorted(places, torch.minimum(at * whole, below), right=True)[:, 0]


def decode_fast(model: Any) -> None:
    """Lets a model on a CPU use `_attend`, if it uses torch's attention now."""
    own = model.device.type == "cpu" and model.config._attn_implementation == "sdpa"
    if own and model._can_set_attn_implementation():
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one token as two products; of more, torch's.

    torch's own kernel for CPUs works on blocks of queries, and is some ten times slower for one
    query. Heads that share keys and values are the rows of one product.

    Args:
        module: The attention module, for torch's.
        query: (n, heads, 1, d).
        key: (n, groups, length, d).
        value: (n, groups, length, d_v).
        attention_mask: Boolean or to be added, (n or 1, 1, 1, length); None for no mask.
        scaling: Of the products; None for d^(-1/2).
        **options: For torch's.
    """
    n, heads, queries, d = query.shape
    groups = key.shape[1]
    of_heads = attention_mask is not None and attention_mask.shape[1:3] != (1, 1)
    if queries != 1 or of_heads or any(options.get(one) is not None for one in _OPTIONS):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    scores = query.reshape(n, groups, heads // groups, d) @ key.transpose(2, 3)
    scores = scores.to(torch.float32) * (d**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(value.dtype)
    return (weights @ value).reshape(n, 1, heads, value.shape[-1]), None

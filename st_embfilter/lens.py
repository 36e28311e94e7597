"""The feature lens: what an embedding says in the words of the model.

Everything over the vocabulary is streamed from W_U block by block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from st_embfilter.errors import ShapeError
from st_embfilter.unembedding import Unembedding


@dataclass(frozen=True)
class LensResult:
    """The nearest tokens of a batch of embeddings.

    Attributes:
        ids: (n, top_k) int64 token ids, most probable first.
        probabilities: (n, top_k) float64, softmax over the whole vocabulary.
    """

    ids: Tensor
    probabilities: Tensor

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
        """The tokens as text, one list per embedding."""
        return [[str(tokenizer.decode([token])) for token in row] for row in self.ids.tolist()]


def logit_lens(
    embeddings: Tensor,
    unembedding: Unembedding,
    projection: Tensor | None = None,
    *,
    top_k: int = 10,
) -> LensResult:
    """The tokens whose logits W_U h are largest (arXiv 2606.07502, section 3).

    Args:
        embeddings: (n, d) pooled hidden states after the final norm, which is never applied again;
            or (n, k) filtered ones with their projection.
        unembedding: W_U, (V, d).
        projection: (k, d) rows V_k^T of the filter; the logits are then W_U V_k V_k^T h.
        top_k: Number of tokens for each embedding.

    Raises:
        ShapeError: If the widths do not fit.
    """
    hidden = embeddings.detach().to("cpu", torch.float64)
    if projection is not None:
        projection = projection.detach().to("cpu", torch.float64)
        if hidden.shape[1] > projection.shape[0]:
            raise ShapeError(
                f"filtered embeddings must have at most {projection.shape[0]} dimensions, got "
                f"{hidden.shape[1]}"
            )
        hidden = hidden @ projection[: hidden.shape[1]]
    if hidden.shape[1] != unembedding.d:
        raise ShapeError(
            f"embeddings must have the {unembedding.d} dimensions of the unembedding matrix, got "
            f"{hidden.shape[1]}"
        )
    top_k = min(top_k, unembedding.stored.shape[0])
    best = torch.full((hidden.shape[0], 0), 0.0, dtype=torch.float64)
    ids = torch.zeros((hidden.shape[0], 0), dtype=torch.int64)
    normaliser = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float64)
    first = 0
    for block in unembedding.blocks():
        logits = hidden @ block.to(torch.float64).T
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(dim=1))
        numbers = torch.arange(first, first + block.shape[0]).expand(hidden.shape[0], -1)
        merged = torch.cat([best, logits], dim=1)
        best, place = merged.topk(min(top_k, merged.shape[1]), dim=1)
        ids = torch.cat([ids, numbers], dim=1).gather(1, place)
        first += block.shape[0]
    return LensResult(ids, (best - normaliser[:, None]).exp())

"""The feature lens: what an embedding says in the words of the model.

Everything over the vocabulary is streamed from W_U block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from st_embfilter.errors import BackboneError, ShapeError
from st_embfilter.model.backbone import backbone_model
from st_embfilter.model.depth import cut_to
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.text import reading
from st_embfilter.unembedding.matrix import Unembedding


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

    def share_of(self, tokens: Tensor) -> float:
        """How many of the nearest tokens are among these.

        Args:
            tokens: int64 token ids, e.g. the most frequent ones.

        Returns:
            Mean over the embeddings, in [0, 1].
        """
        return float(torch.isin(self.ids, tokens).to(torch.float64).mean())


def visible(token: str) -> str:
    """A token as it is shown: without spaces around, escaped where nothing else would be seen."""
    stripped = token.strip()
    return stripped if stripped and stripped.isprintable() else repr(token)


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
        projection: (k, d) rows of the filter. An embedding z is read as the shortest h that it maps
            to z, pinv(projection) z: the logits are W_U V_k z for rows V_k^T. A calibrated filter's
            whitening is undone thereby, its centring is not. Where a gain g is folded into W_U, the
            shortest is that before the gain, n = V_k z, and the logits are W_U diag(g) n.
        top_k: Number of tokens for each embedding.

    Raises:
        ShapeError: If the widths do not fit.
    """
    hidden = embeddings.detach().to("cpu", torch.float64)
    gain = 1.0 if unembedding.gain is None else unembedding.gain
    if projection is None and hidden.shape[1] == unembedding.d:
        hidden = hidden / gain
    elif projection is not None:
        projection = projection.detach().to("cpu", torch.float64)
        if hidden.shape[1] > projection.shape[0]:
            raise ShapeError(
                f"filtered embeddings must have at most {projection.shape[0]} dimensions, got "
                f"{hidden.shape[1]}"
            )
        rows = projection[: hidden.shape[1]] * gain
        hidden = torch.linalg.solve(rows @ rows.T, hidden.T).T @ rows
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
    for block in unembedding.folded_blocks():
        logits = hidden @ block.T
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(dim=1))
        numbers = torch.arange(first, first + block.shape[0]).expand(hidden.shape[0], -1)
        merged = torch.cat([best, logits], dim=1)
        best, place = merged.topk(min(top_k, merged.shape[1]), dim=1)
        ids = torch.cat([ids, numbers], dim=1).gather(1, place)
        first += block.shape[0]
    return LensResult(ids, (best - normaliser[:, None]).exp())


def pooled_embeddings(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    layers: float | int | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> Tensor:
    """Embeddings as they come out of pooling: before the filter, never normalised.

    Args:
        model: With or without a filter.
        texts: Texts to embed.
        layers: Run this many blocks, or this ratio of them, see `Depth.parse`; None for all.
        batch_size: Texts at a time.
        show_progress_bar: Show a bar where a person watches.

    Returns:
        (n, d) float32 on the CPU.

    Raises:
        DepthError: If the model cannot be cut, or not there.
    """
    head = SentenceTransformer(
        modules=list(
            takewhile(lambda module: not isinstance(module, EmbedFilterLayer), model.children())
        ),
        device=str(model.device),
        prompts={name: text for name, text in model.prompts.items() if text is not None},
        default_prompt_name=model.default_prompt_name,
    )
    cut = nullcontext() if layers is None else cut_to(backbone_model(model), layers)
    with reading("the model", BackboneError, "embed texts"), cut:
        embeddings = head.encode(
            list(texts),
            batch_size=batch_size,
            show_progress_bar=None if show_progress_bar else False,
            convert_to_tensor=True,
        )
    return embeddings.to("cpu", torch.float32)

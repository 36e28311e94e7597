"""The feature lens: what an embedding says in the words of the model.

Everything over the vocabulary is streamed from W_U block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from st_embfilter.errors import BackboneError, LensError, ShapeError
from st_embfilter.model.backbone import backbone_model
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
            whitening is undone thereby, its centring is not.
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
        rows = projection[: hidden.shape[1]]
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
    for block in unembedding.blocks():
        logits = hidden @ block.to(torch.float64).T
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
    layer: int | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = True,
) -> Tensor:
    """Embeddings as they come out of pooling: before the filter, never normalised.

    Args:
        model: With or without a filter.
        texts: Texts to embed.
        layer: Read this layer's hidden states instead of the last ones, see `layer_output`.
        batch_size: As in `encode`.
        show_progress_bar: Show a bar where a person watches.

    Returns:
        (n, d) float32 on the CPU.

    Raises:
        LensError: If the model has no such layer, or no final norm to read it with.
    """
    head = SentenceTransformer(
        modules=list(
            takewhile(lambda module: not isinstance(module, EmbedFilterLayer), model.children())
        ),
        device=str(model.device),
        prompts={name: text for name, text in model.prompts.items() if text is not None},
        default_prompt_name=model.default_prompt_name,
    )
    with reading("the model", BackboneError, "embed texts"), layer_output(model, layer):
        embeddings = head.encode(
            list(texts),
            batch_size=batch_size,
            show_progress_bar=None if show_progress_bar else False,
            convert_to_tensor=True,
        )
    return embeddings.to("cpu", torch.float32)


@contextmanager
def layer_output(model: SentenceTransformer, layer: int | None) -> Iterator[None]:
    """Lets the backbone return another layer's hidden states, read through its final norm.

    Hidden states between the layers are unnormalised, so the final norm is applied to every token,
    once. The last layer's have passed it already and stay as they are.

    Args:
        model: Changed while the context lasts.
        layer: 0 for the token embeddings, n for the output of the n-th layer; the model's number of
            layers, or None, for the ordinary output.

    Raises:
        LensError: While the backbone runs, if it has no such layer or no final norm.
    """
    if layer is None:
        yield
        return
    backbone = backbone_model(model)
    latest: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            latest[:] = [(module, output)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **{**kwargs, "output_hidden_states": True})
        states = output.hidden_states
        if not 0 <= layer < len(states):
            raise LensError(
                f"layer must be from 0 (the token embeddings) to {len(states) - 1} (the output), "
                f"got {layer}"
            )
        if layer < len(states) - 1:
            norm = _final_norm(latest, output.last_hidden_state)
            output.last_hidden_state = norm(states[layer])
        return output

    leaves = [module for module in backbone.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(remember) for leaf in leaves]
    # No hook: sentence-transformers calls `forward` itself, which runs none.
    original = backbone.forward
    own = vars(backbone).get("forward")
    backbone.forward = forward
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
        for hook in hooks:
            hook.remove()


def _final_norm(latest: list[tuple[nn.Module, Tensor]], output: Tensor) -> nn.Module:
    """The last module that ran, if it made the output and scales features one by one.

    Found by what it does, so that no list of names per architecture has to be kept.
    """
    module, made = latest[0]
    is_norm = all(parameter.ndim <= 1 for parameter in module.parameters())
    if not is_norm or made.data_ptr() != output.data_ptr():
        raise LensError(
            "reading a layer between needs a backbone that ends in a norm, got one that ends in "
            f"{type(module).__name__}; leave layer out"
        )
    return module

"""ECHO for sentence-transformers: every text twice, pooled over the second time.

This file needs nothing of st-embfilter: it travels in the folders of models that use it, and
`trust_remote_code=True` runs it from there.
"""

# The types of sentence-transformers' modules differ between the versions that this file serves.
# mypy: disable-error-code="no-redef, override, union-attr, misc"

from __future__ import annotations

from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

try:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
except ImportError:  # sentence-transformers < 5.4
    from sentence_transformers.models import Pooling, Transformer

_LONGEST = 2**30  # instead of the huge number that stands for "no limit" in tokenizers


class EchoTransformer(Transformer):
    """A Transformer whose tokenizer repeats the text; `max_seq_length` bounds the total length.

    The tokenizer's own template does the repeating (`tokenizer.json`). It is not asked to cut as
    well: of a text in n pieces it would make all n^2 pairs of them before they are thrown away.
    """

    def preprocess(
        self, inputs: list[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenizes a batch; a prompt goes in front of the text, both times.

        Returns:
            input_ids and attention_mask, (batch, tokens).

        Raises:
            ValueError: If `max_seq_length` leaves no room for the text.
        """
        fixed = self.tokenizer.num_special_tokens_to_add()
        limit = min(self.max_seq_length or _LONGEST, _LONGEST)
        if limit < fixed + 2:
            raise ValueError(
                f"max_seq_length must leave room for the text twice beside the {fixed} tokens of "
                f"the prompt, got {limit}"
            )
        rows = self.tokenizer(
            [(prompt or "") + text for text in inputs],
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # about texts that are longer than the model's
        )["input_ids"]
        room = (limit - fixed) // 2
        rows = [row if len(row) <= fixed + 2 * room else self._cut(row, room) for row in rows]
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            start = longest - len(row) if self.tokenizer.padding_side == "left" else 0
            input_ids[i, start : start + len(row)] = torch.tensor(row)
            attention_mask[i, start : start + len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _cut(self, row: list[int], room: int) -> list[int]:
        """The tokens of a text, with `room` of its own left of them, both times."""
        example = self.tokenizer("a", return_special_tokens_mask=True)
        fixed = self.tokenizer.num_special_tokens_to_add()
        size, length = ((len(ids) - fixed) // 2 for ids in (example["input_ids"], row))
        kept = slice(-room, None) if self.tokenizer.truncation_side == "left" else slice(room)
        cut: list[int] = []
        for around, group in groupby(example["special_tokens_mask"]):
            count = len(list(group))
            if around:
                cut += row[:count]
                row = row[count:]
            else:
                for _ in range(count // size):
                    cut += row[:length][kept]
                    row = row[length:]
        return cut

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
        """The name of `preprocess` in sentence-transformers < 5.4."""
        return self.preprocess(texts)


class EchoPooling(Pooling):
    """Mean over the second occurrence of the text and the closing token.

    A sequence of n tokens holds the text twice and `fixed_tokens` others, one of them at its end;
    so the last (n - fixed_tokens) / 2 + 1 tokens are pooled, whatever the padding side.

    Args:
        embedding_dimension: Width of the token embeddings.
        fixed_tokens: Number of tokens that are the same for all texts.
    """

    config_keys: ClassVar[list[str]] = ["embedding_dimension", "fixed_tokens"]

    def __init__(self, embedding_dimension: int, fixed_tokens: int) -> None:
        super().__init__(embedding_dimension, "mean")
        self.embedding_dimension = embedding_dimension
        self.fixed_tokens = fixed_tokens

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pools `token_embeddings` (batch, tokens, d) to `sentence_embedding` (batch, d)."""
        mask = features["attention_mask"]
        pooled = super().forward({**features, "attention_mask": self.second_occurrence(mask)})
        return {**pooled, "attention_mask": mask}

    def second_occurrence(self, attention_mask: Tensor) -> Tensor:
        """The mask (batch, tokens) of what is pooled, from that of all tokens."""
        from_the_end = attention_mask.flip(1).cumsum(1).flip(1)  # 1 at the last token
        text = (attention_mask.sum(1, keepdim=True) - self.fixed_tokens) // 2
        return attention_mask * (from_the_end <= text + 1)

"""MetaEOL for sentence-transformers: every text in several prompts, their embeddings averaged.

This file needs nothing of st-embfilter: it travels in the folders of models that use it, and
`trust_remote_code=True` runs it from there.
"""

# The types of sentence-transformers' modules differ between the versions that this file serves.
# mypy: disable-error-code="no-redef, override, union-attr, misc"

from __future__ import annotations

from typing import Any, ClassVar

import torch

try:
    from sentence_transformers.sentence_transformer.modules import Transformer
except ImportError:  # sentence-transformers < 5.4
    from sentence_transformers.models import Transformer


class MetaEOLTransformer(Transformer):
    """A Transformer that gives one embedding per prompt, that of its last token.

    Mean pooling after it averages them.

    Args:
        *args: Of `Transformer`.
        prompt_token_ids: Token ids before and after the text, for every prompt.
        **kwargs: Of `Transformer`.
    """

    config_keys: ClassVar[list[str]] = [*Transformer.config_keys, "prompt_token_ids"]

    def __init__(
        self, *args: Any, prompt_token_ids: list[list[list[int]]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.prompt_token_ids = prompt_token_ids or [[[], []]]

    def preprocess(
        self, inputs: list[str], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Tokenizes a batch once and puts it into every prompt; only the text is ever cut.

        Returns:
            input_ids and attention_mask, (batch, prompts, tokens), padded at the right.

        Raises:
            ValueError: If `max_seq_length` leaves no room for the text.
        """
        limit = self.max_seq_length
        fixed = max(len(before) + len(after) for before, after in self.prompt_token_ids)
        if limit is not None and limit < fixed + 1:
            raise ValueError(
                f"max_seq_length must leave room for the text beside the {fixed} tokens of the "
                f"longest prompt, got {limit}"
            )
        texts = self.tokenizer(
            [(prompt or "") + text for text in inputs],
            add_special_tokens=False,
            truncation=True,
            return_attention_mask=False,
        )["input_ids"]
        rows = [
            before + text[: None if limit is None else limit - len(before) - len(after)] + after
            for text in texts
            for before, after in self.prompt_token_ids
        ]
        shape = (len(texts), len(self.prompt_token_ids), max(len(row) for row in rows))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            where = (*divmod(i, shape[1]), slice(len(row)))
            input_ids[where] = torch.tensor(row)
            attention_mask[where] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Any]:
        """The name of `preprocess` in sentence-transformers < 5.4."""
        return self.preprocess(texts)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """One pass per prompt; `token_embeddings` are (batch, prompts, d)."""
        embeddings = []
        for ids, mask in zip(
            features["input_ids"].unbind(1), features["attention_mask"].unbind(1), strict=True
        ):
            last = mask.sum(1) - 1
            longest = int(last.max()) + 1
            tokens = super().forward(
                {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}, **kwargs
            )["token_embeddings"]
            embeddings.append(tokens[torch.arange(len(last), device=last.device), last])
        stacked = torch.stack(embeddings, dim=1)
        return {
            **features,
            "token_embeddings": stacked,
            "attention_mask": torch.ones(stacked.shape[:2], device=stacked.device),
        }

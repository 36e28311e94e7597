"""How often a model's tokens occur in a corpus."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from st_embfilter.errors import CorpusError, FormatError, ProvenanceError, ShapeError
from st_embfilter.text import progress_bar, read_json, reading, shown

#: Most tokens that a file of counts may speak of; no vocabulary comes near.
MAX_VOCABULARY: Final = 10_000_000

#: Pseudo-count of every token, so that unseen ones have a finite log probability.
SMOOTHING: Final = 1.0

#: Tokens in each group of the paper's logit spectroscopy.
GROUP_SIZE: Final = 100

_BATCH: Final = 1000

#: Formats whose columns `datasets` reads, by file suffix.
_BUILDERS: Final = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TokenCounts:
    """Occurrences of each token of one tokenizer in one corpus.

    Attributes:
        counts: (n,) int64, one for each token of the tokenizer; special tokens are not added.
        texts: Number of texts that were counted.
        vocabulary: sha256 of the tokenizer's vocabulary.
    """

    counts: Tensor = field(repr=False)
    texts: int
    vocabulary: str

    @property
    def total(self) -> int:
        """Tokens that were counted."""
        return int(self.counts.sum())

    def log_probabilities(self, rows: int, *, smoothing: float = SMOOTHING) -> Tensor:
        """Log of the smoothed unigram probabilities.

        Additive smoothing: p_j = (c_j + a) / (N + a V) over all V rows of the unembedding matrix.
        So an unseen token, and a padded row that is no token, counts as a of a token; a = 1 is
        Laplace's rule of succession.

        Args:
            rows: V, at least the number of tokens that occur.
            smoothing: The pseudo-count a > 0.

        Returns:
            (V,) float64; the probabilities sum to 1.

        Raises:
            ShapeError: If a token occurs that has no row.
            CorpusError: If smoothing is not positive.
        """
        if not smoothing > 0:
            raise CorpusError(
                f"smoothing must be > 0, or unseen tokens have probability 0, got {smoothing!r}"
            )
        if bool(self.counts[rows:].any()):
            last = int(self.counts.nonzero().max())
            raise ShapeError(
                f"every token must have a row in the unembedding matrix, got token id {last} and "
                f"{rows} rows; count with the tokenizer of this model"
            )
        padded = torch.zeros(rows, dtype=torch.float64)
        known = min(rows, self.counts.shape[0])
        padded[:known] = self.counts[:known].to(torch.float64)
        return (padded + smoothing).log() - (padded.sum() + smoothing * rows).log()

    def groups(self, size: int = GROUP_SIZE, *, seed: int = 0) -> dict[str, Tensor]:
        """The token groups of the paper's spectroscopy.

        Args:
            size: Tokens in a group, if as many were seen.
            seed: Seed of the random group.

        Returns:
            int64 token ids. "frequent": the highest counts, ties to the lower id. "rare": the
            lowest counts above 0, ties to the higher id, which is the later merge of a BPE
            vocabulary. "random": drawn from the whole vocabulary, seen or not.
        """
        seen = self.counts.nonzero().flatten()
        by_count = seen[self.counts[seen].argsort(descending=True, stable=True)]
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(self.counts.shape[0], generator=generator)
        return {
            "frequent": by_count[:size],
            "rare": by_count.flip(0)[:size],
            "random": drawn[:size],
        }

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Checks that these are counts of that tokenizer's tokens.

        Raises:
            ProvenanceError: If they are of another vocabulary.
        """
        found = vocabulary_hash(tokenizer)
        if found != self.vocabulary:
            raise ProvenanceError(
                "token counts must come from the tokenizer of the model, got counts of the "
                f"vocabulary {self.vocabulary[:12]} for a tokenizer with {found[:12]}; count the "
                "corpus again with this model"
            )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the tokens that occur, as safetensors: 12 bytes each.

        Raises:
            CorpusError: If the file cannot be written.
        """
        seen = self.counts.nonzero().flatten()
        about = {
            "size": str(self.counts.shape[0]),
            "texts": str(self.texts),
            "vocabulary": self.vocabulary,
        }
        tensors = {"ids": seen.to(torch.int32), "counts": self.counts[seen]}
        try:
            Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata=about)
        except (OSError, SafetensorError) as error:
            raise CorpusError(f"cannot write token counts to {file}: {error}") from error

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> TokenCounts:
        """Reads what `save` wrote.

        Raises:
            FormatError: If it is no such file.
        """
        with reading(file, must="hold token counts as `TokenCounts.save` writes them"):
            with safe_open(file, framework="pt") as stored:
                about = stored.metadata() or {}
                ids, values = stored.get_tensor("ids").long(), stored.get_tensor("counts")
            size, texts = int(about["size"]), int(about["texts"])
            if not 0 < size <= MAX_VOCABULARY or not 0 <= texts < 2**53:
                raise FormatError(
                    f"{file} must speak of 1 to {MAX_VOCABULARY:,} tokens and of less than 2**53 "
                    f"texts, got {size} and {texts}"
                )
            if ids.dim() != 1 or len(ids.unique()) != len(ids) or bool((ids < 0).any()):
                raise FormatError(f"{file}: ids must be different numbers >= 0, got others")
            if bool((values < 0).any()):
                raise FormatError(f"{file}: token counts must be >= 0, got {int(values.min())}")
            counts = torch.zeros(size, dtype=torch.int64)
            counts[ids] = values
            return cls(counts, texts, about["vocabulary"])


def count_tokens(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    show_progress_bar: bool = True,
) -> TokenCounts:
    """Counts tokens of a stream of texts; never holds more than a batch of it.

    Args:
        texts: Any iterable; tokenized whole, without special tokens.
        tokenizer: The model's.
        show_progress_bar: Show a bar that counts texts.

    Raises:
        CorpusError: If there is not a single token.
    """
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    stream = iter(texts)
    number = 0
    with progress_bar("Counting tokens", " texts", show=show_progress_bar) as bar:
        while batch := list(islice(stream, _BATCH)):
            encoded = tokenizer(
                batch, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            occurrences = Counter(token for ids in encoded["input_ids"] for token in ids)
            counts[torch.tensor(list(occurrences), dtype=torch.int64)] += torch.tensor(
                list(occurrences.values()), dtype=torch.int64
            )
            number += len(batch)
            bar.update(len(batch))
    if not bool(counts.any()):
        raise CorpusError(
            f"a corpus must hold at least one token, got {number} texts with none; check the file "
            "and the column"
        )
    return TokenCounts(counts, number, vocabulary_hash(tokenizer))


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the tokens and their ids."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def read_texts(source: str, column: str | None = None, *, split: str = "train") -> Iterator[str]:
    """Streams texts from a file or a dataset; empty ones are left out.

    Args:
        source: A text file (a text is a line); a .jsonl, .json, .csv, .tsv or .parquet file with
            a column; or the Hub id of a dataset with a column.
        column: Name of a column of texts, or of lists of texts.
        split: Split of a dataset on the Hub.

    Raises:
        CorpusError: If the source, the column or its texts are not as described. Checked as the
            stream is read.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if not os.path.isfile(path):
        if os.path.exists(path) or suffix in (".txt", ".jsonl", *_BUILDERS):
            raise CorpusError(f"a corpus must be a file or a dataset's Hub id, got {source}")
        rows = _dataset(source, column, split=split)
    elif suffix in _BUILDERS:
        options = {"delimiter": "\t"} if suffix == ".tsv" else {}
        rows = _dataset(_BUILDERS[suffix], column, data_files=source, split="train", **options)
    elif suffix == ".jsonl":
        rows = _json_lines(path, _needed(column, source))
    else:
        if column is not None:
            raise CorpusError(f"a text file has no columns, got column={column!r} for {source}")
        rows = _lines(path)
    for value in rows:
        for text in value if isinstance(value, list) else [value]:
            if not isinstance(text, str):
                raise CorpusError(
                    f"column {column!r} of {source} must hold texts, got {type(text).__name__}"
                )
            if text.strip():
                yield text


class Sampler:
    """Passes a stream on and keeps a uniform sample of it (reservoir sampling).

    Args:
        stream: Any iterable of texts.
        size: Texts in the sample, or all of them if there are fewer.
        seed: The sample is a function of the stream and the seed.
    """

    def __init__(self, stream: Iterable[str], size: int, *, seed: int = 0) -> None:
        self.sample: list[str] = []
        self._stream = stream
        self._size = size
        self._random = random.Random(seed)  # noqa: S311 - a sample, no secret

    def __iter__(self) -> Iterator[str]:
        for number, text in enumerate(self._stream):
            if number < self._size:
                self.sample.append(text)
            else:
                place = self._random.randrange(number + 1)
                if place < self._size:
                    self.sample[place] = text
            yield text


def _lines(path: Path) -> Iterator[str]:
    with (
        reading(f"the corpus {path}", CorpusError, "be UTF-8 text"),
        path.open(encoding="utf-8") as file,
    ):
        for line in file:
            yield line.rstrip("\n")


def _json_lines(path: Path, column: str) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        record = read_json(line, f"{path}, line {number}:", CorpusError)
        if column not in record:
            known = shown(", ".join(record))
            raise CorpusError(f"{path}, line {number}: must have {column!r}, got {known}")
        yield record[column]


def _dataset(name: str, column: str | None, **options: Any) -> Iterator[Any]:
    column = _needed(column, options.get("data_files", name))
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"reading {options.get('data_files', name)} needs the package datasets; install it or "
            "give a text or .jsonl file"
        ) from error
    try:
        for row in datasets.load_dataset(name, streaming=True, **options):
            if column not in row:
                raise CorpusError(
                    f"{options.get('data_files', name)} must have the column {column!r}, got "
                    f"{', '.join(row)}"
                )
            yield row[column]
    except CorpusError:
        raise
    except Exception as error:  # of many libraries, all with the same meaning here
        raise CorpusError(f"cannot read the dataset {name!r}: {error}") from error


def _needed(column: str | None, source: str) -> str:
    if column is None:
        raise CorpusError(f"reading {source} needs the name of a column, got none; pass column")
    return column

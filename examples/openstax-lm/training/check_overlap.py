"""Counts sentences of evaluation texts that are in a corpus, as they are or nearly.

    python check_overlap.py --corpus corpus --evaluation stsb scifact banking77 --show 3

An evaluation folder may hold `.csv` (the column `text`, or every cell but numbers), `.jsonl` and
`.jsonl.gz` (`title` and `text`), and `.txt` (one text a line); other files are left out.

Sentences are compared as lower-case words. Two are near duplicates if the Jaccard similarity of
their sets of words and pairs of neighbours is at least `--similarity`; one word of eleven replaced
gives 0.75. The search is exact: two sets that are so similar must share a feature among the
rarest few of each (prefix filtering, Chaudhuri, Ganti and Kaushik 2006).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from prepare import corpus_files, paragraphs
from tqdm.auto import tqdm

#: Shorter sentences ("How do I do it?" apart) are the same by chance.
MIN_WORDS = 5

Sentence = tuple[str, ...]

_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of a text as words, without case, punctuation and typography."""
    text = unicodedata.normalize("NFKC", text).casefold()
    for sentence in _SENTENCE_END.split(text):
        yield tuple(_WORD.findall(sentence))


def features(sentence: Sentence) -> set[str]:
    """Words and pairs of neighbours."""
    return {*sentence, *map(" ".join, pairwise(sentence))}


def evaluation_texts(folder: Path) -> Iterator[str]:
    """The texts of an evaluation set."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            opened = gzip.open if path.suffix == ".gz" else open
            with opened(path, "rt", encoding="utf-8") as lines:
                for entry in map(json.loads, lines):
                    yield ". ".join(filter(None, (entry.get("title"), entry.get("text"))))
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as lines:
                rows = list(csv.reader(lines))
            if "text" in rows[0]:
                column = rows[0].index("text")
                yield from (row[column] for row in rows[1:])
            else:
                yield from (cell for row in rows for cell in row if not _is_number(cell))
        elif path.suffix == ".txt":
            yield from path.read_text(encoding="utf-8").splitlines()


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


@dataclass
class Overlap:
    """What of one evaluation set is in the corpus.

    Attributes:
        texts: Different texts, each as its sentences of at least `MIN_WORDS` words.
        exact: Those that are a sentence of the corpus.
        near: Others that are similar to one, with it and the similarity.
    """

    texts: list[set[Sentence]]
    exact: set[Sentence] = field(default_factory=set)
    near: dict[Sentence, tuple[float, Sentence]] = field(default_factory=dict)

    @property
    def compared(self) -> set[Sentence]:
        """All sentences."""
        return set().union(*self.texts)

    @property
    def whole(self) -> int:
        """Number of texts all of whose sentences are in the corpus, as they are or nearly."""
        found = self.exact | set(self.near)
        return sum(bool(text) and text <= found for text in self.texts)


def overlaps(
    corpus: Iterable[str], evaluation: dict[str, Iterable[str]], *, similarity: float
) -> dict[str, Overlap]:
    """Finds the sentences of evaluation sets in a corpus.

    Args:
        corpus: Paragraphs.
        evaluation: Texts of every set.
        similarity: Least Jaccard similarity of a near duplicate, in (0, 1].
    """
    found = {}
    for name, texts in evaluation.items():
        found[name] = Overlap(
            [{s for s in sentences(text) if len(s) >= MIN_WORDS} for text in set(texts)]
        )
    compared = {name: overlap.compared for name, overlap in found.items()}
    wanted = sorted(set().union(*compared.values()))
    sets = [features(sentence) for sentence in wanted]
    frequency = Counter(feature for members in sets for feature in members)

    def prefix(members: set[str]) -> list[str]:
        rarest = sorted(members, key=lambda feature: (frequency[feature], feature))
        return rarest[: len(members) - math.ceil(similarity * len(members)) + 1]

    index: dict[str, list[int]] = defaultdict(list)
    for number, members in enumerate(sets):
        for feature in prefix(members):
            index[feature].append(number)
    best: dict[int, tuple[float, Sentence]] = {}
    seen: set[Sentence] = set()
    for paragraph in corpus:
        for sentence in sentences(paragraph):
            if len(sentence) < MIN_WORDS or sentence in seen:
                continue
            seen.add(sentence)
            members = features(sentence)
            for number in {n for feature in prefix(members) for n in index.get(feature, ())}:
                both = len(members & sets[number])
                jaccard = both / (len(members) + len(sets[number]) - both)
                exact = sentence == wanted[number]
                if jaccard >= similarity and (exact or jaccard > best.get(number, (0.0,))[0]):
                    best[number] = (2.0 if exact else jaccard, sentence)
    for number, (score, sentence) in best.items():
        for name, overlap in found.items():
            if wanted[number] in compared[name]:
                if score > 1:
                    overlap.exact.add(wanted[number])
                else:
                    overlap.near[wanted[number]] = (score, sentence)
    return found


def main() -> None:
    """Command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--similarity", type=float, default=0.7, help="in (0, 1]; default 0.7")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="examples of each kind")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    if not 0 < args.similarity <= 1:
        parser.error(f"--similarity must be in (0, 1], got {args.similarity}")
    for folder in args.evaluation:
        if not folder.is_dir():
            parser.error(f"--evaluation takes folders, got {folder}")
    corpus = tqdm(
        paragraphs(corpus_files(args.corpus)),
        desc="comparing",
        unit=" paragraphs",
        disable=True if args.quiet else None,
        leave=False,
    )
    found = overlaps(
        corpus,
        {folder.name: evaluation_texts(folder) for folder in args.evaluation},
        similarity=args.similarity,
    )
    print(f"{'':14} {'texts':>8} {'sentences':>10} {'exact':>6} {'near':>6} {'whole texts':>12}")
    for name, overlap in found.items():
        sizes = f"{len(overlap.texts):8,} {len(overlap.compared):10,}"
        counts = f"{len(overlap.exact):6,} {len(overlap.near):6,} {overlap.whole:12,}"
        print(f"{name:14.14} {sizes} {counts}")
    for name, overlap in found.items():
        for sentence in sorted(overlap.exact)[: args.show]:
            print(f"\n{name}, exact\n  {' '.join(sentence)}")
        by_score = sorted(overlap.near.items(), key=lambda item: (-item[1][0], item[0]))
        for sentence, (score, other) in by_score[: args.show]:
            print(f"\n{name}, {score:.2f}\n  {' '.join(sentence)}\n  {' '.join(other)}")


if __name__ == "__main__":
    main()

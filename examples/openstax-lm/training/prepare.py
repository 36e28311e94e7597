"""Turns plain text into a tokenizer and packed windows of tokens, the same bytes every time.

    python prepare.py --corpus corpus --output prepared

The corpus is any mix of UTF-8 text files and folders of `*.txt` files, one paragraph a line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm

END_OF_TEXT = "<|endoftext|>"
RECIPE = Path(__file__).with_name("recipe.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

Windows = NDArray[np.uint16]


@dataclass(frozen=True)
class Prepared:
    """What training reads: packed windows, and the folder with the tokenizer they were made by.

    Attributes:
        folder: Holds the tokenizer's files.
        fingerprint: sha256 of the corpus and of the settings.
        train: (n, window) token ids.
        heldout: (m, window) token ids of paragraphs that `train` has none of.
    """

    folder: Path
    fingerprint: str
    train: Windows
    heldout: Windows


def corpus_files(corpus: Sequence[Path]) -> list[Path]:
    """The text files of a corpus, in the order of their names.

    Raises:
        SystemExit: If a path does not exist or there is no text file.
    """
    files: set[Path] = set()
    for path in corpus:
        if not path.exists():
            raise SystemExit(f"a corpus is made of files and folders that exist, got {path}")
        files.update(path.rglob("*.txt") if path.is_dir() else [path])
    if not files:
        raise SystemExit(f"no *.txt file in {', '.join(map(str, corpus))}; give text files")
    return sorted(files, key=lambda file: (file.name, file.as_posix()))


def paragraphs(files: Sequence[Path]) -> Iterator[str]:
    """Every line that is not blank, without its end.

    Raises:
        SystemExit: If a file is not UTF-8.
    """
    for file in files:
        with file.open(encoding="utf-8", newline="\n") as lines:
            try:
                yield from (line.rstrip("\n") for line in lines if line.strip())
            except UnicodeDecodeError as error:
                raise SystemExit(f"text files must be UTF-8, {file} is not: {error}") from error


def train_tokenizer(
    files: Sequence[Path], vocab_size: int, *, show_progress_bar: bool = True
) -> Tokenizer:
    """Byte-level BPE with BOS in front of every text.

    It is trained on the files and not on `paragraphs`, because the ends of lines are counted too:
    without them the 97th merge, a space and an end of line, would be another one.

    Args:
        files: UTF-8 text.
        vocab_size: Number of tokens, at least 257: one special token and every byte.
        show_progress_bar: Show a bar.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress_bar,
    )
    tokenizer.train([str(file) for file in files], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Writes the three files that transformers 4 and 5 load a tokenizer from."""
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def is_heldout(paragraph: str, fraction: float) -> bool:
    """Whether a paragraph is held out, decided by its text: copies stay together."""
    digest = hashlib.sha256(paragraph.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def pack(
    tokenizer: Tokenizer,
    texts: Iterator[str],
    *,
    window: int,
    heldout_fraction: float,
    show_progress_bar: bool = True,
) -> tuple[Windows, Windows]:
    """Tokenizes paragraphs, joins them and cuts the stream into windows; what is left over goes.

    Returns:
        The training windows (n, window) and the held-out ones (m, window).
    """
    streams: tuple[list[Windows], list[Windows]] = ([], [])
    bar = tqdm(
        desc="tokenizing",
        unit=" paragraphs",
        disable=None if show_progress_bar else True,
        leave=False,
    )
    with bar:
        while chunk := [text for _, text in zip(range(1024), texts, strict=False)]:
            for text, encoding in zip(chunk, tokenizer.encode_batch_fast(chunk), strict=True):
                stream = streams[is_heldout(text, heldout_fraction)]
                stream.append(np.array(encoding.ids, dtype=np.uint16))
            bar.update(len(chunk))
    train, heldout = (np.concatenate([np.empty(0, dtype=np.uint16), *stream]) for stream in streams)
    return _cut(train, window), _cut(heldout, window)


def _cut(stream: Windows, window: int) -> Windows:
    return stream[: len(stream) // window * window].reshape(-1, window)


def fingerprint(files: Sequence[Path], recipe: dict[str, Any]) -> str:
    """Sha256 of everything that the tokenizer and the windows are made of."""
    digest = hashlib.sha256()
    size, length = recipe["model"]["vocab_size"], recipe["model"]["max_position_embeddings"]
    digest.update(json.dumps([size, length, recipe["data"]], sort_keys=True).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def prepare(
    corpus: Sequence[Path],
    folder: Path,
    recipe: dict[str, Any],
    *,
    show_progress_bar: bool = True,
) -> Prepared:
    """Makes the tokenizer and the windows, or reads them if the folder has them already.

    Args:
        corpus: Text files and folders of them.
        folder: Where `tokenizer.json`, `train.npy` and `heldout.npy` are kept.
        recipe: `recipe.json`; its `model` and `data` parts are read.
        show_progress_bar: Show bars.

    Raises:
        SystemExit: If the corpus cannot be read, or is too small for a held-out window.
    """
    files = corpus_files(corpus)
    digest = fingerprint(files, recipe)
    done = folder / "fingerprint.txt"
    if not (done.is_file() and done.read_text() == digest):
        done.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        for _ in paragraphs(files):  # finds text that is not UTF-8 before anything is trained
            pass
        vocab_size = recipe["model"]["vocab_size"]
        if not 257 <= vocab_size <= 2**16:
            raise SystemExit(f"vocab_size must be in [257, 65536], got {vocab_size}")
        tokenizer = train_tokenizer(files, vocab_size, show_progress_bar=show_progress_bar)
        save_tokenizer(tokenizer, folder, max_length=recipe["model"]["max_position_embeddings"])
        windows = pack(
            tokenizer, paragraphs(files), **recipe["data"], show_progress_bar=show_progress_bar
        )
        for name, array in zip(("train", "heldout"), windows, strict=True):
            if not len(array):
                raise SystemExit(f"too little text: it fills no {name} window; give more")
            np.save(folder / f"{name}.npy", array)
        done.write_text(digest)
    train, heldout = (np.load(folder / f"{name}.npy") for name in ("train", "heldout"))
    return Prepared(folder, digest, train, heldout)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, metavar="PATH")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--recipe", type=Path, default=RECIPE, metavar="FILE")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    recipe = json.loads(args.recipe.read_text())
    prepared = prepare(args.corpus, args.output, recipe, show_progress_bar=not args.quiet)
    tokenizer = (args.output / "tokenizer.json").read_bytes()
    print(f"tokenizer.json  sha256 {hashlib.sha256(tokenizer).hexdigest()}")
    for name, windows in (("train", prepared.train), ("held out", prepared.heldout)):
        print(f"{name:14}  {len(windows):,} windows, {windows.size:,} tokens")


if __name__ == "__main__":
    main()

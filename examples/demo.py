"""What the filter does to a real language model, on texts that come along: `make demo`.

    python -m examples.demo [--lm smollm2|gemma|qwen|openstax] [--output FOLDER]

Builds the filtered model twice, with mean pooling and with the prompt PromptEOL, saves it, loads it
with plain sentence-transformers, and shows what changes. All texts are encoded once for each; every
smaller filter is a prefix of those vectors.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples import models

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

EXAMPLES = Path(__file__).resolve().parent
OPENSTAX = EXAMPLES / "openstax-lm"

#: Ratios of directions kept; the first is built, the others are its prefixes.
RATIOS = {"3/4": 3 / 4, "1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}

RECIPES = {"mean pooling": None, "PromptEOL": "prompteol"}

#: Names of the measures that fit a line of a terminal.
MEASURES = {"retrieval": "search", "pairs": "pairs", "clustering": "topics"}

QUERY = "the internet is slow upstairs"


class Encoded(NamedTuple):
    """Vectors of all texts by one recipe.

    Attributes:
        model: The saved model, as plain sentence-transformers loads it.
        raw: (n, d) vectors without the filter.
        filtered: (n, k) vectors with it, in nested order.
    """

    model: SentenceTransformer
    raw: np.ndarray
    filtered: np.ndarray


def run(model: Path, output: Path, out: Console, *, bars: bool = True) -> None:
    """The demo.

    Args:
        model: A GGUF file, or a folder of a causal language model.
        output: Folder in which one folder for each recipe is written.
        out: Where the results are printed.
        bars: Show progress bars.
    """
    import numpy as np

    from st_embfilter.evaluation.demo import DEMO_TEXTS, Paraphrases

    texts = Paraphrases.read(DEMO_TEXTS)
    encoded = {
        title: _encode(model, prompt, output / title.replace(" ", "-"), texts.texts, bars)
        for title, prompt in RECIPES.items()
    }
    mean = encoded["mean pooling"]
    d = mean.raw.shape[1]
    dims = {"raw": d, **{name: int(d * ratio) for name, ratio in RATIOS.items()}}
    vectors = {
        title: {"raw": one.raw, **{name: one.filtered[:, : dims[name]] for name in RATIOS}}
        for title, one in encoded.items()
    }
    scores = {
        (title, name): texts.scores(np.asarray(rows, dtype=np.float64))
        for title, by_name in vectors.items()
        for name, rows in by_name.items()
    }
    _print_scores(dims, scores, out)
    _print_tokens(mean, out)
    _print_search("PromptEOL", encoded["PromptEOL"], texts.texts, out)


def _encode(
    source: Path, prompt: str | None, folder: Path, texts: list[str], bars: bool
) -> Encoded:
    from sentence_transformers import SentenceTransformer

    import st_embfilter

    built = st_embfilter.from_causal_lm(
        source,
        prompt=prompt,
        keep=RATIOS["3/4"],
        device="cpu",
        dtype="float32",
        show_progress_bar=bars,
    )
    st_embfilter.save_pretrained(built, folder)
    model = SentenceTransformer(str(folder), device="cpu")
    raw = SentenceTransformer(modules=list(model.children())[:2], device="cpu")
    if bars and sys.stderr.isatty():
        print(f"Encoding {len(texts)} texts, {prompt or 'mean pooling'}", file=sys.stderr)
    vectors: Any = raw.encode(
        texts, convert_to_tensor=True, show_progress_bar=bars and sys.stderr.isatty()
    )
    dense = model[2].linear.weight.detach()
    return Encoded(model, vectors.numpy(), (vectors @ dense.T).numpy())


def _print_scores(
    dims: dict[str, int], scores: dict[tuple[str, str], dict[str, float]], out: Console
) -> None:
    table = Table(title="Scores x 100 on the demo texts", title_justify="left")
    for column in ("keep", "dims", "GB per\nmillion"):
        table.add_column(column, justify="left" if column == "keep" else "right")
    for title in RECIPES:
        for i, name in enumerate(MEASURES.values()):
            heading = "" if i else title.removesuffix(" pooling")
            table.add_column(f"{heading}\n{name}", justify="right")
    below = 0
    for name, width in dims.items():
        cells = []
        for title in RECIPES:
            for key in MEASURES:
                score = scores[title, name][key]
                lower = score < scores[title, "raw"][key]
                below += lower
                cells.append(f"{score:.1f}{'*' if lower else ' '}")
        table.add_row(name, str(width), f"{width * 4 / 1000:.2f}", *cells)
    out.print(table)
    total = len(RECIPES) * len(MEASURES) * len(RATIOS)
    out.print(f"* below the raw model: {below} of {total} figures")
    out.print(
        "search: nDCG@10 of finding the texts that mean the same, among others that share their "
        "words; pairs: average precision of telling the two apart; topics: v-measure of 12 "
        "clusters. GB per million: of vectors in float32.\n"
    )


def _print_tokens(encoded: Encoded, out: Console) -> None:
    from st_embfilter.evaluation.demo import SHOWN_TEXTS
    from st_embfilter.lens.tokens import logit_lens
    from st_embfilter.unembedding.source import open_unembedding

    model = encoded.model
    raw = type(model)(modules=list(model.children())[:2], device="cpu")
    hidden = raw.encode(list(SHOWN_TEXTS), convert_to_tensor=True, show_progress_bar=False)
    projection = model[2].linear.weight.detach()
    unembedding = open_unembedding(model[0].auto_model.config._name_or_path)
    before = logit_lens(hidden, unembedding, top_k=5)
    after = logit_lens(hidden @ projection.T, unembedding, projection, top_k=5)
    table = Table(
        title="Tokens nearest to the embedding (mean pooling)",
        title_justify="left",
        show_lines=True,
    )
    for column in ("text", "raw", "keep 3/4"):
        table.add_column(column)
    for text, *sides in zip(
        SHOWN_TEXTS, before.tokens(model.tokenizer), after.tokens(model.tokenizer), strict=True
    ):
        words = [" ".join(token.strip() or repr(token) for token in side) for side in sides]
        table.add_row(escape(text), *map(escape, words))
    out.print(table)


def _print_search(title: str, encoded: Encoded, texts: list[str], out: Console) -> None:
    import numpy as np

    from st_embfilter.spectrum.unit import unit_rows

    model = encoded.model
    raw = type(model)(modules=list(model.children())[:2], device="cpu")
    found = []
    for one, rows in ((raw, encoded.raw), (model, encoded.filtered)):
        query = one.encode([QUERY], show_progress_bar=False)
        cosine = unit_rows(rows.astype(np.float64)) @ unit_rows(query.astype(np.float64))[0]
        found.append([texts[i] for i in np.argsort(-cosine)[:3]])
    table = Table(
        title=f'\nA search ({title}) among {len(texts)} texts: "{QUERY}"',
        title_justify="left",
        show_lines=True,
    )
    table.add_column("")
    table.add_column("raw")
    table.add_column("keep 3/4")
    for place, pair in enumerate(zip(*found, strict=True), 1):
        table.add_row(str(place), *map(escape, pair))
    out.print(table)


def _model(name: str, out: Console) -> Path:
    """The model, or the bundled one where that of the registry cannot be had."""
    if name == "openstax":
        return OPENSTAX
    try:
        path = models.path_of(name)
        if not path.is_file():
            out.print(f"{models.MODELS[name].title}: {models.MODELS[name].megabytes} MB, once")
            path = models.fetch(name, quiet=not sys.stderr.isatty())
    except models.FetchError as error:
        out.print(f"The bundled language model is used instead: {escape(str(error))}")
        return OPENSTAX
    out.print(f"{models.MODELS[name].title}, licence: {models.MODELS[name].licence}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo")
    parser.add_argument("--lm", choices=[*models.MODELS, "openstax"], default="smollm2")
    parser.add_argument("--output", type=Path, help="keep the filtered models in this folder")
    parsed = parser.parse_args(arguments)
    # Before the libraries are imported, which read it then.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    out = Console(highlight=False)
    model = _model(parsed.lm, out)
    with tempfile.TemporaryDirectory(prefix="st-embfilter-") as temporary:
        run(model, parsed.output or Path(temporary), out)
    if model == OPENSTAX:
        out.print("The bundled LM is tiny: examples/openstax-lm/README.md says what to expect.")
    if parsed.output is not None:
        out.print(f"Saved to {escape(str(parsed.output))}")


if __name__ == "__main__":
    main()

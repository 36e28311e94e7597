"""Renders the cards in this folder: `make model-cards`.

The card of the bundled language model is that of a model built here, with figures measured by the
command that it gives. So are those of the real language models: `make model-cards BUILD=--build`
fetches and builds them, and keeps the small files of their folders in `built/`, from which the
cards can be rendered without them; their figures are rows of docs/results.jsonl. The cards of the
paper's models state its recipes, windows and figures: they were neither built nor measured here, so
what only a build can tell (revision, hashes) is left out.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import st_embfilter
from examples import models
from st_embfilter import PromptEOL
from st_embfilter.saved.card import card_of_folder, render
from st_embfilter.saved.card_facts import CardFacts
from st_embfilter.saved.layout import RESULTS_FILE
from st_embfilter.saved.results import Result, read_results, write_results

FOLDER = Path(__file__).parent
DEMO_LM = FOLDER.parent / "examples" / "openstax-lm"
MEASURED = FOLDER / "openstax-lm-embfilter.jsonl"
BUILT = FOLDER / "built"
RESULTS = FOLDER.parent / "docs" / "results.jsonl"
PAPER = "arXiv 2606.07502"

#: Real language models by their names in `examples/models.py`, and the recipe of their cards.
REAL_MODELS = {"SmolLM2-135M-Instruct": "smollm2", "Qwen2.5-Coder-0.5B-Instruct": "qwen"}
RECIPE = "prompteol"

#: What a card is rendered from.
SMALL_FILES = (
    "embfilter.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "README.md",
)

# The paper's columns; in parentheses the number of tasks that each one is the mean of.
COLUMNS = (
    "STS (10)",
    "Classification (12)",
    "Clustering (11)",
    "Pair classification (3)",
    "Reranking (4)",
    "Retrieval (8)",
    "Summarization (1)",
    "All (49)",
)

EOL = 'Summarize the sentence: "{text}" in one word:"'
MISTRAL_EOL = 'This sentence: "{text}" means [MASK]'


def reported(band: str, *rows: tuple[str, int, str]) -> tuple[Result, ...]:
    """Rows of the paper's table as scores."""
    return tuple(
        Result(
            task="MTEB English",
            dataset=dataset,
            split="test",
            metric="main score",
            dims=dims,
            score=round(float(figure) / 100, 4),
            configuration=band if kind == "filter" else kind,
            source=PAPER,
        )
        for kind, dims, figures in rows
        for dataset, figure in zip(COLUMNS, figures.split(), strict=True)
    )


PAPER_MODELS = (
    CardFacts(
        base_model="Qwen/Qwen2.5-0.5B",
        d=896, k=448, band="bulk", start=224, keep=0.5,
        tensor="model.embed_tokens.weight", vocabulary=151_936, dtype="bfloat16", tied=True,
        prompt=PromptEOL(EOL), pooling="lasttoken", max_seq_length=512,
        inherited={
            "license": "apache-2.0",
            "license_link": "https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/LICENSE",
            "language": ["en"],
        },
        results=reported(
            "bulk",
            ("raw", 896, "63.04 69.20 34.91 55.15 49.33 27.31 27.30 50.07"),
            ("filter", 448, "69.48 70.32 39.20 64.72 51.28 34.73 27.12 54.57"),
            ("filter", 224, "68.57 68.92 38.24 64.54 50.62 32.85 27.67 53.47"),
            ("filter", 112, "68.03 66.07 35.50 63.57 49.70 29.82 28.37 51.43"),
        ),
    ),
    CardFacts(
        base_model="meta-llama/Llama-3.1-8B-Instruct",
        d=4096, k=2048, band="bulk", start=1024, keep=0.5,
        tensor="lm_head.weight", vocabulary=128_256, dtype="bfloat16",
        prompt=PromptEOL(EOL), pooling="lasttoken", max_seq_length=512,
        inherited={
            "license": "llama3.1",
            "language": ["en", "de", "fr", "it", "pt", "hi", "es", "th"],
        },
        results=reported(
            "bulk",
            ("raw", 4096, "75.19 73.39 39.30 64.22 53.67 25.45 25.49 55.13"),
            ("filter", 2048, "76.66 73.78 40.67 66.64 54.68 29.69 27.39 56.79"),
            ("filter", 1024, "76.63 73.73 40.57 66.63 54.65 29.86 27.51 56.78"),
            ("filter", 512, "76.33 73.10 40.32 66.41 54.41 29.70 27.93 56.46"),
        ),
    ),
    CardFacts(
        base_model="mistralai/Mistral-7B-Instruct-v0.3",
        d=4096, k=2048, band="offset:128", start=128, keep=0.5,
        tensor="lm_head.weight", vocabulary=32_768, dtype="bfloat16",
        prompt=PromptEOL(MISTRAL_EOL), pooling="lasttoken", max_seq_length=512,
        inherited={"license": "apache-2.0"},
        results=reported(
            "offset:128",
            ("raw", 4096, "64.15 71.26 33.40 58.51 48.10 20.91 24.72 49.47"),
            ("filter", 2048, "66.59 71.17 36.16 62.07 49.63 24.59 24.33 51.50"),
            ("filter", 1024, "67.55 70.92 37.41 63.29 50.11 25.97 24.66 52.26"),
            ("filter", 512, "68.11 70.07 38.04 63.67 50.20 25.92 25.79 52.35"),
        ),
    ),
)  # fmt: skip


def demo_card() -> str:
    """The card of the bundled language model's filter, built here."""
    model = st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = st_embfilter.save_pretrained(model, Path(temporary) / "model")
        (folder / RESULTS_FILE).write_text(MEASURED.read_text(encoding="utf-8"), encoding="utf-8")
        return card_of_folder(folder)


def build(title: str) -> None:
    """Builds a real language model's filter and keeps the small files of its folder."""
    name = REAL_MODELS[title]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / f"{title}.gguf"  # the name that the card gives it
        shutil.copyfile(models.fetch(name), source)
        model = st_embfilter.from_causal_lm(
            source, prompt=RECIPE, keep=0.75, device="cpu", show_progress_bar=False
        )
        folder = st_embfilter.save_pretrained(model, Path(temporary) / "model")
        for file in SMALL_FILES:
            target = BUILT / title / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)


def real_card(title: str) -> str:
    """The card of a real language model's filter, from the small files of its folder."""
    rows = [
        row
        for row in read_results(RESULTS)
        if (row.model, row.prompt) == (REAL_MODELS[title], RECIPE)
        and row.configuration in ("raw", "bulk")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(BUILT / title, temporary, dirs_exist_ok=True))
        write_results(rows, folder / RESULTS_FILE)
        return card_of_folder(folder)


def cards() -> dict[str, str]:
    """Every card by its file name."""
    rendered = {f"{facts.name}.md": render(facts) for facts in PAPER_MODELS}
    real = {f"{title}-embfilter.md": real_card(title) for title in REAL_MODELS}
    return {"openstax-lm-embfilter.md": demo_card(), **real, **rendered}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Renders the cards in this folder.")
    parser.add_argument("--build", action="store_true", help="build the real models first")
    if parser.parse_args().build:
        for title in REAL_MODELS:
            build(title)
    for name, text in cards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

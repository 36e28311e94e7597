"""Puts beside the page what it loads: a model, texts, and transformers.js out of npm.

    python -m examples.browser.prepare                # or: make browser
    python -m http.server --directory examples/browser

The model is a static one, `layers=0`, with every direction kept in nested order and 8 bits an
entry: all of its numbers are the raw embedding, turned; its first k are the filter of width k.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import st_embfilter
from compat.javascript import vendor, visit
from examples.models import MODELS, fetch
from st_embfilter.saved.onnx_out import OnnxExport

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ROOT / "examples" / "data" / "paraphrases.jsonl"
DEMO_LM = ROOT / "examples" / "openstax-lm"

#: What is typed for the picture.
QUERY = "A star that is far away from us."

_TYPING = """<script type="module">
const typed = QUERY;
const box = document.getElementById("query");
const shown = (id) => [...document.querySelectorAll(`#${id} li`)].map((item) =>
  [item.querySelector("span").textContent, Number(item.querySelector("b").textContent)]);
const post = (value) => fetch("./result", { method: "POST", body: JSON.stringify(value) });
let asked = false;
const look = () => {
  const { searched, failed } = document.body.dataset;
  if (failed) post({ error: failed });
  else if (searched === typed) post({ raw: shown("raw"), filtered: shown("filtered") });
  else if (searched && !asked) {
    asked = true;
    box.value = typed;
    box.dispatchEvent(new Event("input"));
  }
};
new MutationObserver(look).observe(document.body, { attributes: true });
look();
</script>"""


def texts() -> list[str]:
    """The texts that are searched: all of examples/data."""
    groups = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    return [text for group in groups for text in (*group["paraphrases"], *group["distractors"])]


def prepare(folder: Path, model: str | Path, title: str) -> OnnxExport:
    """Writes model and texts into a folder that holds the page, or will."""
    static = st_embfilter.from_causal_lm(
        model, keep=1.0, layers=0, device="cpu", show_progress_bar=False
    )
    made = st_embfilter.export_onnx(static, folder / "model", dtype="int8", overwrite=True)
    found = {"title": f"{title}, token embeddings alone, 8 bits", "texts": texts()}
    (folder / "texts.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return made


def typing(query: str) -> str:
    """HTML that types a query into the page and posts what it then shows."""
    return _TYPING.replace("QUERY", json.dumps(query))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", choices=("smollm2", "openstax"), default="smollm2")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--picture", type=Path, help="PNG of the page to write, with Chromium")
    arguments = parser.parse_args()
    title = (
        "The bundled language model" if arguments.lm == "openstax" else MODELS[arguments.lm].title
    )
    model = DEMO_LM if arguments.lm == "openstax" else fetch(arguments.lm)
    vendor(arguments.output / "vendor")
    made = prepare(arguments.output, model, title)
    print(f"{made.file}: {made.dimensions} numbers, lowest cosine to torch {made.cosine:.5f}")
    if arguments.picture is not None:
        options = {"tail": typing(QUERY), "picture": arguments.picture}
        visit(arguments.output, "index.html", **options)
    print(f"python -m http.server --directory {arguments.output}")


if __name__ == "__main__":
    main()

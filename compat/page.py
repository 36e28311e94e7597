"""The text of docs/compatibility.md."""

from __future__ import annotations

from dataclasses import dataclass

from compat.stacks import FOLDERS, TEXTS, Stack

#: Largest difference of an entry, or, of graphs, relative to an embedding's length.
TOLERANCE = 1e-5

_BESIDE = ("sentence-transformers", "transformers", "onnxruntime", "tokenizers")


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        stack: What was run.
        versions: Of packages there.
        difference: Largest; None if it failed.
        normalizes: Whether it scaled embeddings that the model does not.
        problem: Why the row is no success.
        loss: Of 8 bits, relative to an embedding's length.
        memory: Most that a process of it held, in MB; None where nothing tells.
    """

    stack: Stack
    versions: dict[str, str]
    difference: float | None
    normalizes: bool
    problem: str | None
    loss: float | None = None
    memory: int | None = None


def row(outcome: Outcome) -> str:
    """A line of the table."""
    stack, versions = outcome.stack, outcome.versions
    wanted = dict(text.split("==") for text in stack.requirements if "==" in text)
    own = versions.get(stack.package) or wanted.get(stack.package, "")
    beside = ", ".join(
        f"{name} {versions.get(name) or wanted[name]}"
        for name in _BESIDE
        if name != stack.package
        and (name in versions or name in wanted)
        and not (name == "tokenizers" and "transformers" in versions)
    )
    gap = "" if outcome.difference is None else f"{outcome.difference:.1g}"
    result = "same embeddings" if outcome.problem is None else f"**no**: {outcome.problem}"
    if outcome.normalizes and outcome.problem is None:
        result = "same cosines"
    if outcome.loss is not None and outcome.problem is None:
        result += f"; 8 bits: {outcome.loss:.1%} of their length"
    unit = "always" if outcome.normalizes else "as the model"
    memory = "" if outcome.memory is None else f"{outcome.memory:,}"
    cells = (f"{stack.name} {own}", beside, stack.note, stack.long, unit, memory, gap, result)
    return "| " + " | ".join(cells) + " |"


def page(outcomes: list[Outcome], served: list[tuple[str, str, str | None]], code: str) -> str:
    """The text of docs/compatibility.md.

    Args:
        outcomes: Of every stack, in their order.
        served: What the servers' rules say: name, version, problem.
        code: What the code was that all of them ran with.
    """
    checked = [
        f"| {name} {version} | "
        + ("keeps the rules" if problem is None else f"**no**: {problem}")
        + " |"
        for name, version, problem in served
    ]
    torch = sorted({o.versions["torch"] for o in outcomes if "torch" in o.versions})
    rows = "\n".join(map(row, outcomes))
    return f"""# Where a saved model loads

Written by `make compat`. Folders saved by `save_pretrained` ({"; ".join(FOLDERS)}) are
loaded in environments that have nothing of this project installed, {len(TEXTS)} texts are embedded,
and the embeddings are compared with those that this project gives. Tolerance: {TOLERANCE:g} in
every entry; for graphs, which other kernels compute, of an embedding's length.

All rows ran with one state of `st_embfilter/` and `compat/`: {code} (`python -m compat.run
--code`).

| loaded through | with | how | long texts | unit length | peak, MB | difference | result |
|-|-|-|-|-|-:|-:|-|
{rows}

All with torch {", ".join(torch)} on a CPU. Difference: the largest. Peak: the most that one
process ever held, libraries included, with the bundled language model of 6.8 million parameters.

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

Sentence-transformers 5 and older add up the states of all tokens in the dtype of the backbone: in
float16 the mean of a long text is `inf`. Of abstracts of SciFact, put together to one text, the
states of SmolLM2 add up beyond float16 after some 3,300 tokens, those of Qwen2.5-Coder after some
1,500. They load float16 folders in float32 unless told otherwise (with transformers 4); version 6
adds up in float32.

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

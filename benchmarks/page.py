"""Runs the benchmarks and writes docs/benchmarks.md; sections that are not run stay as they were.

python -m benchmarks.page [--only build] [--only load] [--cache FOLDER] [--value DATA=FOLDER]

Words of a command in capitals stand for what a machine has: DATA, as `benchmarks/depth.py` takes
it; SMOLLM2 and QWEN, folders of SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct in float32,
with -BF16 in bfloat16, and with -GGUF the files that they come from. A section is left as it was
without them.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Section:
    """One heading of the page.

    Attributes:
        title: The heading.
        text: What is compared.
        command: Words after `python`.
        cached: Whether it takes --cache.
    """

    title: str
    text: str
    command: str
    cached: bool = True


SECTIONS = {
    "build": Section(
        "Building a filter",
        "Time (best of two) and growth of peak memory, each in a fresh process, imports not "
        "counted, the file in the system's cache. "
        "Random bfloat16 matrices with the singular values of the demo LM, stretched to the width.",
        "benchmarks/build.py --shape qwen2.5-0.5b --repeat 2",
    ),
    "build-large": Section(
        "Building a filter, a large matrix",
        "The same where scipy and scikit-learn take too long.",
        "benchmarks/build.py --shape llama-3.1-8b --method ours --method torch-svd --method read "
        "--method multiply --repeat 2",
    ),
    "growth": Section(
        "How a build grows",
        "The Gram matrix costs V d^2, its eigenvectors d^3, reading V d.",
        "benchmarks/build.py --growth --repeat 3",
    ),
    "encode": Section(
        "Encoding",
        "The filter's share of the time of `model.encode`, and our throughput against the "
        "reference code's way, on a model of Qwen2.5-0.5B's shape.",
        "benchmarks/encode.py --texts 64 --batches 1",
    ),
    "encode-small": Section(
        "Encoding, a small model",
        "The same where the backbone costs little, so that everything else shows.",
        "benchmarks/encode.py --shape small",
    ),
    "depths": Section(
        "Encoding with fewer blocks, and with none",
        "SmolLM2-135M-Instruct, dequantised to float32, mean pooling, saved and loaded with plain "
        "sentence-transformers, in a process of its own each, in turn. Peak memory is that of the "
        "whole process. The scores of the table are its folder's; the others are those of "
        "`docs/depth.md`.",
        "-m benchmarks.encode --depths SMOLLM2 --name SmolLM2-135M-Instruct --data DATA "
        "--layers 6 --texts 64 --repeat 1",
        cached=False,
    ),
    "depth-sweep": Section(
        "A sweep over all depths",
        "SmolLM2-135M-Instruct: every text encoded once by the whole model, the same with the "
        "vectors of all 31 depths and two poolings written to disk, and the sweep of the raw model "
        "and the filter at each of them, intervals included.",
        "benchmarks/sweep.py --depths --model SMOLLM2 --texts 512 --repeat 1",
        cached=False,
    ),
    "load": Section(
        "Loading",
        "A backbone of Qwen2.5-0.5B's shape, loaded alone and with its filter, in turn; and "
        "`import st_embfilter` on top of `import sentence_transformers`.",
        "benchmarks/load.py",
        cached=False,
    ),
    "onnx": Section(
        "ONNX",
        "SmolLM2-135M as one graph: what the export takes, check included, and what it loses; ONNX "
        "Runtime against torch on the same batches, in turn. `dynamic` is onnxruntime's dynamic "
        "quantisation, which `export_onnx` does not use.",
        "benchmarks/onnx_export.py",
        cached=False,
    ),
    "onnx-shallow": Section(
        "ONNX, 6 blocks",
        "The same with the first 6 of 30 blocks.",
        "benchmarks/onnx_export.py --layers 6",
        cached=False,
    ),
    "bake": Section(
        "Baking a filter into the weights",
        "SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct: memory of an export, beyond the "
        "libraries and the input file, against the largest tensor written. Folders of bfloat16.",
        "-m benchmarks.bake SMOLLM2-BF16 QWEN-BF16 --gguf SMOLLM2-GGUF --gguf QWEN-GGUF",
        cached=False,
    ),
    "sweep": Section(
        "A sweep of 40 configurations",
        "Against encoding once and scoring 40 sets of ready vectors, intervals included.",
        "benchmarks/sweep.py",
        cached=False,
    ),
    "spectroscopy": Section(
        "Logit spectroscopy",
        "Everything from opening the file to the shifts of all directions, in a fresh process.",
        "benchmarks/spectroscopy.py",
    ),
}


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} threads"


def run(section: Section, cache: Path, values: dict[str, str]) -> str:
    """The section's text, with what its command printed."""
    words = [values.get(word, word) for word in section.command.split()]
    words += ["--cache", str(cache)] if section.cached else []
    print(f"python {section.command}", flush=True)
    # Standard error is left out: progress bars and warnings of libraries.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    print(done.stdout, flush=True)
    return (
        f"{section.text}\n\n```\n$ python {section.command}\n{done.stdout.strip()}\n```\n\n"
        f"{processor()}; torch {version('torch')}, transformers {version('transformers')}, "
        f"sentence-transformers {version('sentence-transformers')}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st-embfilter-bench")
    parser.add_argument("--value", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    values = dict(value.split("=", 1) for value in args.value)
    old = PAGE.read_text() if PAGE.exists() else ""
    kept = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", old, re.DOTALL | re.MULTILINE))
    for name in args.only or SECTIONS:
        if any(w.isupper() and w not in values for w in SECTIONS[name].command.split()):
            print(f"{name}: left as it was, it needs --value", flush=True)
            continue
        kept[SECTIONS[name].title] = run(SECTIONS[name], args.cache, values)
        parts = [
            f"## {section.title}\n\n{kept[section.title].strip()}\n"
            for section in SECTIONS.values()
            if section.title in kept
        ]
        head = (
            "# Benchmarks\n\nWritten by `make benchmark`; do not edit. Machines are noisy: compare "
            "within a section, not between them.\n"
        )
        PAGE.write_text("\n".join([head, *parts]))


if __name__ == "__main__":
    main()

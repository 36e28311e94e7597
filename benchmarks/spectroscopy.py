"""Time and peak memory of the logit spectroscopy of a large matrix, in a fresh process.

Writes a random bfloat16 matrix once, with Zipfian token counts, then measures everything from
opening the file to dpi of all directions for three token groups: the float64 spectrum, the average
token, the shifts. The peak is that of the whole process, libraries included.

    OMP_NUM_THREADS=2 python benchmarks/spectroscopy.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, WIDTH = 151_936, 896


def matrix(cache: Path, rows: int, width: int) -> Path:
    """Writes the checkpoint of one random matrix; returns its folder."""
    folder = cache / f"random-{rows}x{width}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen2",
        "vocab_size": rows,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": width,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weight = torch.empty(rows, width, dtype=torch.bfloat16)
    for part in weight.split(8192):
        part.copy_(torch.randn(part.shape))
    partial = folder / "model.safetensors.tmp"
    save_file({"model.embed_tokens.weight": weight}, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")
    return folder


def measure(folder: Path) -> dict[str, float]:
    """Runs the spectroscopy in this process."""
    from st_embfilter.lens.counts import TokenCounts
    from st_embfilter.lens.spectroscopy import spectroscopy_of_counts
    from st_embfilter.unembedding.source import open_unembedding

    imported = peak_mib()
    start = time.perf_counter()
    unembedding = open_unembedding(folder)
    rows = unembedding.stored.shape[0]
    counts = TokenCounts((1e7 / torch.arange(1, rows + 1)).long(), texts=1, vocabulary="")
    spectrum, _ = unembedding.fit(precision="float64")
    fitted = time.perf_counter()
    found = spectroscopy_of_counts(unembedding, spectrum, counts)
    stop = time.perf_counter()
    if any(shift.shape != (unembedding.d,) for shift in found.shifts.values()):
        raise SystemExit("spectroscopy gave the wrong shape")
    return {
        "spectrum": fitted - start,
        "spectroscopy": stop - fitted,
        "imported": imported,
        "peak": peak_mib(),
    }


def peak_mib() -> float:
    """Peak resident memory of this program; getrusage would count the process it was forked from.

    From /proc, so on Linux only.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st-embfilter-bench")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child)))
        return
    folder = matrix(args.cache, args.rows, args.width)
    print(f"W_U {args.rows:,} x {args.width:,} bfloat16, {torch.get_num_threads()} threads")
    for _ in range(args.repeat):
        command = [sys.executable, __file__, "--child", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True)
        run = json.loads(done.stdout)
        print(
            f"{run['spectrum'] + run['spectroscopy']:.1f} s (spectrum {run['spectrum']:.1f}, "
            f"average token and spectroscopy {run['spectroscopy']:.1f}), "
            f"peak {run['peak']:.0f} MiB ({run['imported']:.0f} MiB after the imports)"
        )


if __name__ == "__main__":
    main()

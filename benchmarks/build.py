"""Time and peak memory of building a filter, against a full SVD, in one run.

Writes bfloat16 checkpoints of real models' shapes once (random matrices with the singular values
of the demo LM, stretched to the width), then runs every method in a fresh process and reports the
seconds after the imports and the growth of the process's peak memory.

    python benchmarks/build.py --shape qwen2.5-0.5b --shape llama-3.1-8b
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_LM = REPOSITORY / "examples" / "openstax-lm"
SHAPES = {"qwen2.5-0.5b": (151_936, 896), "llama-3.1-8b": (128_256, 4_096)}
#: The two curves: rows at a fixed width, and widths at a fixed number of rows.
GROWTH = {
    "rows V": ["16384x512", "32768x512", "65536x512", "131072x512"],
    "columns d": ["32768x256", "32768x512", "32768x1024", "32768x2048"],
}
METHODS = {
    "ours": "st_embfilter.build_filter",
    "ours-float64": "st_embfilter.build_filter, float64 blocks",
    "torch-svd": "torch.linalg.svd(W.float(), full_matrices=False)",
    "scipy-svd": "scipy.linalg.svd(W, full_matrices=False), float32",
    "sklearn-truncated": "sklearn TruncatedSVD(k = d - 1, randomized)",
    "read": "floor: reading the bytes of W_U",
    "multiply": "floor: the products of W^T W at the machine's float32 peak (half of 2 V d^2)",
}


def size(shape: str) -> tuple[int, int]:
    """(V, d) of a named shape, or of one like 32768x512."""
    if shape in SHAPES:
        return SHAPES[shape]
    rows, _, d = shape.partition("x")
    return int(rows), int(d)


def checkpoint(shape: str, cache: Path) -> Path:
    """Writes config.json and the one tensor of a checkpoint; returns its folder."""
    rows, d = size(shape)
    folder = cache / shape
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": d,
        "num_attention_heads": d // 64,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": d,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    demo = load_file(DEMO_LM / "model.safetensors")["model.embed_tokens.weight"].float()
    profile = torch.linalg.svdvals(demo)
    singular = torch.nn.functional.interpolate(
        profile.log()[None, None], size=d, mode="linear", align_corners=True
    )[0, 0].exp()
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    mix = (singular / rows**0.5)[:, None] * basis
    weight = torch.empty(rows, d, dtype=torch.bfloat16)
    for part in weight.split(8192):
        part.copy_((torch.randn(part.shape[0], d) @ mix).bfloat16())
    partial = folder / "model.safetensors.tmp"
    save_file({"model.embed_tokens.weight": weight}, partial, metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")
    return folder


def run(method: str, folder: Path) -> dict[str, float]:
    """Runs one method in this process."""
    file = folder / "model.safetensors"
    name = "model.embed_tokens.weight"
    if method.startswith("ours"):
        from transformers import LlamaForCausalLM  # noqa: F401 - an import, not work

        from st_embfilter.model.build import build_filter
    else:
        import scipy.linalg
        from sklearn.decomposition import TruncatedSVD
    before = peak_mib()
    start = time.perf_counter()
    if method == "ours":
        build_filter(folder, show_progress_bar=False)
    elif method == "ours-float64":
        build_filter(folder, precision="float64", show_progress_bar=False)
    elif method == "torch-svd":
        torch.linalg.svd(load_file(file)[name].float(), full_matrices=False)
    elif method == "scipy-svd":
        scipy.linalg.svd(load_file(file)[name].float().numpy(), full_matrices=False)
    elif method == "sklearn-truncated":
        weight = load_file(file)[name].float().numpy()
        TruncatedSVD(weight.shape[1] - 1, n_iter=5, random_state=0).fit(weight)
    elif method == "read":
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    elif method == "multiply":
        from scipy.linalg import blas

        rows, d = size(folder.name)
        block = torch.randn(4096, d).numpy()
        blas.ssyrk(1.0, block.T)
        once = time.perf_counter()
        blas.ssyrk(1.0, block.T)
        start = time.perf_counter() - (time.perf_counter() - once) * rows / 4096
    seconds = time.perf_counter() - start
    after = peak_mib()
    return {"seconds": seconds, "mib": after - before}


def peak_mib() -> float:
    """Peak of this process alone; ru_maxrss would count the parent before the exec."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def best_of(method: str, folder: Path, repeat: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", method, str(folder)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        for _ in range(repeat)
    ]
    return min(runs, key=lambda result: result["seconds"])


def compare(shape: str, methods: list[str], cache: Path, repeat: int) -> None:
    folder = checkpoint(shape, cache)
    rows, d = size(shape)
    print(f"\n{shape}: W_U {rows:,} x {d:,} bfloat16, {torch.get_num_threads()} threads")
    print(f"{'':58} {'seconds':>8} {'MiB':>7} {'time':>6} {'memory':>7}")
    run("read", folder)  # into the system's file cache: the disk is not what is compared
    ours: dict[str, float] | None = None
    for method in methods:
        best = best_of(method, folder, repeat)
        ours = ours or best
        floor = method in ("read", "multiply")
        memory = "" if floor else f"{best['mib']:7.0f} "
        ratio = "" if floor else f"{best['mib'] / ours['mib']:6.1f}x"
        print(
            f"{METHODS[method]:58.58} {best['seconds']:8.2f} {memory:8}"
            f"{best['seconds'] / ours['seconds']:5.2f}x {ratio}",
            flush=True,
        )


def growth(cache: Path, repeat: int) -> None:
    for name, shapes in GROWTH.items():
        print(f"\nGrowth with the {name}")
        times = [best_of("ours", checkpoint(shape, cache), repeat)["seconds"] for shape in shapes]
        for i, (shape, seconds) in enumerate(zip(shapes, times, strict=True)):
            step = "" if i == 0 else f"{seconds / times[i - 1]:5.2f}x the row above"
            bar = "#" * max(1, round(40 * seconds / max(times)))
            print(f"{shape:>12} {seconds:7.2f} s  {bar:40} {step}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="a name, or rows x columns: 32000x512")
    parser.add_argument("--method", action="append", choices=METHODS)
    parser.add_argument("--repeat", type=int, default=1, help="best of N runs of each method")
    parser.add_argument("--growth", action="store_true", help="only the two curves in V and d")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/st-embfilter-bench")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child[0], Path(args.child[1]))))
        return
    if args.growth:
        growth(args.cache, args.repeat)
        return
    for shape in args.shape or list(SHAPES):
        # A randomised SVD of full rank takes many times as long as an exact one.
        default = [m for m in METHODS if m != "sklearn-truncated" or size(shape)[1] < 1024]
        compare(shape, args.method or default, args.cache, args.repeat)


if __name__ == "__main__":
    main()

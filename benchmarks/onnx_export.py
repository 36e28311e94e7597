"""Export to ONNX: time, peak of memory and loss; and the throughput of ONNX Runtime against torch.

python benchmarks/onnx_export.py [MODEL] [--layers 6] [--dtype float32 --dtype int8]

MODEL is a folder or a GGUF file of a language model; SmolLM2-135M if none is given, as
`make models` fetches it. Each export runs in a fresh process. Its memory is the highest that it
ever held, without what it held when all libraries were there and no model was: weights, exporter
and check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import st_embfilter
from examples.models import MODELS, fetch

TEXTS = Path(__file__).resolve().parents[1] / "examples" / "data" / "paraphrases.jsonl"
DTYPES = ("float32", "float16", "int8")


def status(key: str) -> int:
    """A number of bytes that Linux tells about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def child(saved: Path, target: Path, dtype: Any) -> None:
    """Loads, exports, and prints what it took as JSON."""
    import onnxruntime.quantization
    import torch

    from st_embfilter.saved import load, onnx_out
    from st_embfilter.saved.onnx_graph import libraries

    libraries()
    del onnxruntime, load, onnx_out  # all libraries are there
    torch.set_num_threads(1)
    before = status("VmRSS")
    model = st_embfilter.load(saved, device="cpu")
    weights = sum(value.nbytes for value in model.state_dict().values())
    start, used = time.perf_counter(), time.process_time()
    made = st_embfilter.export_onnx(model, target, dtype=dtype)
    facts = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - used,
        "weights": weights,
        "peak": status("VmHWM") - before,
        "size": (target / made.file).stat().st_size,
        "difference": made.difference,
        "cosine": made.cosine,
        "file": made.file,
    }
    print(json.dumps(facts))


def throughput(saved: Path, graphs: dict[str, Path], texts: list[str], batch: int) -> None:
    """Texts a second of torch and of each graph, in turn, on one thread; best of three."""
    import onnxruntime
    import torch

    torch.set_num_threads(1)
    model = st_embfilter.load(saved, device="cpu")
    ordered = sorted(texts, key=len, reverse=True)
    batches = [
        {k: v.numpy() for k, v in model.preprocess(ordered[i : i + batch]).items()
         if k in ("input_ids", "attention_mask")}
        for i in range(0, len(ordered), batch)
    ]  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runs: dict[str, Any] = {"torch": None}
    for dtype, file in graphs.items():
        runs[dtype] = onnxruntime.InferenceSession(file, options)
    best = dict.fromkeys(runs, 0.0)
    for _ in range(3):
        for name, session in runs.items():
            start = time.perf_counter()
            for inputs in batches:
                if session is not None:
                    session.run(None, inputs)
                    continue
                with torch.inference_mode():
                    model({key: torch.from_numpy(value) for key, value in inputs.items()})
            best[name] = max(best[name], len(texts) / (time.perf_counter() - start))
    tokens = np.mean([inputs["attention_mask"].sum() / batch for inputs in batches])
    print(
        f"{len(texts)} texts of {tokens:.0f} tokens, batches of {batch}, one thread, texts/second:"
    )
    for name, speed in best.items():
        title = name if name == "torch" else f"ONNX Runtime, {name}"
        print(f"  {title:24} {speed:8.1f}  {speed / best['torch']:.2f} x torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(Path(args.child[0]), Path(args.child[1]), args.child[2])
        return
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


def measure(args: argparse.Namespace, place: Path) -> None:
    """Saves the model, exports it, and compares the throughput."""
    name = args.model or fetch("smollm2")
    model = st_embfilter.from_causal_lm(
        name, layers=args.layers, dtype="float32", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, place / "saved")
    del model
    title = MODELS["smollm2"].title if args.model is None else name.name
    print(title if args.layers is None else f"{title}, {args.layers} blocks")
    graphs = {}
    for dtype in args.dtype or DTYPES:
        words = ["--child", saved, place / dtype, dtype]
        command = [sys.executable, "-W", "ignore", __file__, *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        facts = json.loads(done.stdout.splitlines()[-1])
        graphs[dtype] = place / dtype / facts["file"]
        seconds, peak = facts["seconds"], facts["peak"]
        print(
            f"{dtype:8} {seconds:4.0f} s ({facts['processor']:.0f} s of the processor), "
            f"peak {peak / 1e6:,.0f} MB = {peak / facts['weights']:.2f} x weights, "
            f"file {facts['size'] / 1e6:,.0f} MB; "
            f"difference {facts['difference']:.1e}, cosine {facts['cosine']:.5f}"
        )
    lines = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    texts = [text for group in lines for text in group["paraphrases"]]
    throughput(saved, graphs, texts[: args.texts], args.batch)


if __name__ == "__main__":
    main()

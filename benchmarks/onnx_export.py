"""Export to ONNX: time, peak of memory and loss; and the throughput of ONNX Runtime against torch.

python benchmarks/onnx_export.py [MODEL] [--layers 6] [--dtype float32 --dtype int8]

MODEL is a folder or a GGUF file of a language model; SmolLM2-135M if none is given, as
`make models` fetches it. Each export runs in a fresh process. Its memory is the highest that it
ever held, without what it held when all libraries were there and no model was: weights, exporter
and check. The graph in float32 is also given to onnxruntime's dynamic quantisation, as
something to compare the type int8 with; that peak does not count the export before it.
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
from st_embfilter.saved.onnx_out import _loss

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


def dynamic(graph: Path, target: Path) -> None:
    """What int8 is compared with; matrices for the products, a scale for each column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before, start = status("VmRSS"), time.process_time()
    quantize_dynamic(
        graph,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QUInt8,  # signed ones saturate on processors without VNNI
    )
    used = time.process_time() - start
    print(json.dumps({"processor": used, "peak": status("VmHWM") - before}))


def throughput(saved: Path, graphs: dict[str, Path], texts: list[str], batch: int) -> None:
    """Texts a second of the processor of torch and of each graph, in turn; best of three."""
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
    held = {"torch": sum(value.nbytes for value in model.state_dict().values())}
    for dtype, file in graphs.items():
        before = status("VmRSS")
        runs[dtype] = onnxruntime.InferenceSession(file, options)
        held[dtype] = status("VmRSS") - before
    best = dict.fromkeys(runs, 0.0)
    found: dict[str, Any] = {}
    for _ in range(3):
        for name, session in runs.items():
            start = time.process_time()
            vectors = [_embed(model, session, inputs) for inputs in batches]
            best[name] = max(best[name], len(texts) / (time.process_time() - start))
            found[name] = np.concatenate(vectors)
    tokens = np.mean([inputs["attention_mask"].sum() / batch for inputs in batches])
    print(
        f"{len(texts)} texts of {tokens:.0f} tokens, batches of {batch}, one thread; texts a "
        "second of the processor, memory when loaded, difference and lowest cosine to torch:"
    )
    for name, speed in best.items():
        title = name if name == "torch" else f"ONNX Runtime, {name}"
        line = f"  {title:24} {speed:6.1f}  {speed / best['torch']:.2f} x torch  "
        line += f"{held[name] / 1e6:5,.0f} MB"
        if name != "torch":
            difference, cosine = _loss(found[name], found["torch"])
            line += f"  {difference:.1e}  {cosine:.5f}"
        print(line)


def _embed(model: Any, session: Any, inputs: dict[str, Any]) -> Any:
    """Embeddings of a batch, in torch if there is no session."""
    import torch

    if session is not None:
        return session.run(["sentence_embedding"], inputs)[0]
    with torch.inference_mode():
        given = {key: torch.from_numpy(value) for key, value in inputs.items()}
        return model(given)["sentence_embedding"].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--dynamic", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dynamic:
        dynamic(*args.dynamic)
        return
    if args.child:
        child(Path(args.child[0]), Path(args.child[1]), args.child[2])
        return
    with tempfile.TemporaryDirectory() as place:
        measure(args, Path(place))


def fresh(*words: object) -> dict[str, Any]:
    """What this script prints as JSON in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: argparse.Namespace, place: Path) -> None:
    """Saves the model, exports it, and compares the throughput."""
    name = args.model or fetch("smollm2", quiet=True)
    model = st_embfilter.from_causal_lm(
        name, layers=args.layers, dtype="float32", device="cpu", show_progress_bar=False
    )
    saved = st_embfilter.save_pretrained(model, place / "saved")
    del model
    title = MODELS["smollm2"].title if args.model is None else name.name
    print(title if args.layers is None else f"{title}, {args.layers} blocks")
    graphs = {}
    for dtype in args.dtype or DTYPES:
        facts = fresh("--child", saved, place / dtype, dtype)
        graphs[dtype] = place / dtype / facts["file"]
        print(
            f"{dtype:8} {facts['seconds']:4.0f} s ({facts['processor']:.0f} s of the processor), "
            f"peak {facts['peak'] / 1e6:,.0f} MB = {facts['peak'] / facts['weights']:.2f} x "
            f"weights, file {facts['size'] / 1e6:,.0f} MB; "
            f"difference {facts['difference']:.1e}, cosine {facts['cosine']:.5f}"
        )
    if "float32" in graphs:
        graphs["dynamic"] = place / "dynamic.onnx"
        facts = fresh("--dynamic", graphs["float32"], graphs["dynamic"])
        print(
            f"dynamic quantisation of the file in float32: {facts['processor']:.0f} s of the "
            f"processor, peak {facts['peak'] / 1e6:,.0f} MB"
        )
    lines = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    texts = [text for group in lines for text in group["paraphrases"]]
    throughput(saved, graphs, texts[: args.texts], args.batch)


if __name__ == "__main__":
    main()

"""Memory of an export with the filter baked into the weights, against the largest tensor.

python -m benchmarks.bake FOLDER.. [--gguf FILE.gguf]..

FOLDER is a checkpoint of a language model, whose filter is built first; it is written as a plain
folder (`export --baked`), a GGUF file as one of float16. Each export runs in a fresh process. Its
memory is the highest anonymous one, looked up two hundred times a second, beyond that which it held
when all libraries were there and no model was; pages of files that are mapped are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path

import st_embfilter
from benchmarks.onnx_export import status
from tests.conftest import tiny_lm


class Anonymous:
    """The largest anonymous memory while it is entered."""

    def __enter__(self) -> Anonymous:
        self.bytes = status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def child(source: Path, target: Path) -> None:
    """Exports, and prints what it took as JSON."""
    import scipy.linalg
    import torch

    from st_embfilter.saved.baked_folder import export_folder
    from st_embfilter.saved.gguf_out import export_gguf
    from st_embfilter.unembedding.gguf import library

    library()
    del scipy
    with tempfile.TemporaryDirectory() as place:  # whatever is loaded late is loaded now
        small = Path(place)
        tiny_lm(small / "lm")
        model = st_embfilter.from_causal_lm(
            small / "lm", norm="folded", device="cpu", show_progress_bar=False
        )
        export_folder(st_embfilter.save_pretrained(model, small / "filtered"), small / "out")
        del model
    torch.set_num_threads(1)
    before, used = status("RssAnon"), time.process_time()
    with Anonymous() as peak:
        (export_gguf if source.suffix == ".gguf" else export_folder)(source, target)
    facts = {"memory": peak.bytes - before, "seconds": time.process_time() - used}
    print(json.dumps(facts))


def largest(target: Path) -> int:
    """Bytes of the largest tensor of an export."""
    if target.suffix == ".gguf":
        from st_embfilter.unembedding.gguf import GGUFFile

        return max(tensor.nbytes for tensor in GGUFFile.open(target).tensors.values())
    from safetensors import safe_open

    with safe_open(target / "model.safetensors", "pt") as file:
        shapes = (file.get_slice(name) for name in file.keys())  # noqa: SIM118
        sizes = {"F32": 4, "F16": 2, "BF16": 2}
        return max(prod(found.get_shape()) * sizes[found.get_dtype()] for found in shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--gguf", action="append", default=[], type=Path)
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    print(f"{'':32}{'largest tensor, MiB':>20}{'memory, MiB':>13}{'of it':>7}{'core s':>8}")
    for source in [*args.folders, *args.gguf]:
        with tempfile.TemporaryDirectory() as place:
            given, target = source, Path(place) / "out.gguf"
            if source.suffix != ".gguf":
                given, target = Path(place) / "filtered", Path(place) / "out"
                model = st_embfilter.from_causal_lm(
                    source, norm="folded", device="cpu", show_progress_bar=False
                )
                st_embfilter.save_pretrained(model, given)
                del model
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bake", "--child"]
            done = subprocess.run(
                [*command, str(given), str(target)], stdout=subprocess.PIPE, check=True
            )
            facts = json.loads(done.stdout.splitlines()[-1])
            whole = largest(target)
        name = f"{source.name} to {'GGUF' if source.suffix == '.gguf' else 'a folder'}"
        print(
            f"{name:32}{whole / 2**20:20.0f}{facts['memory'] / 2**20:13.0f}"
            f"{facts['memory'] / whole:7.2f}{facts['seconds']:8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What a filter costs at loading time, as ratios inside one run.

A folder with a backbone of Qwen2.5-0.5B's shape and random weights is loaded as it is and with its
filter, in turn; and `import st_embfilter` is compared with `import sentence_transformers`.

    python benchmarks/load.py [--repeat 15] [--small]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import st_embfilter
from st_embfilter.model.backbone import load_backbone
from st_embfilter.unembedding.source import Source

DEMO_LM = Path(__file__).resolve().parents[1] / "examples" / "openstax-lm"


def folders(place: Path, small: bool) -> tuple[Path, Path]:
    """The raw and the filtered model."""
    torch.manual_seed(0)
    size = (
        {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        if small
        else {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    )
    config = LlamaConfig(
        vocab_size=8192 if small else 151_936,
        num_attention_heads=size["hidden_size"] // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **size,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place / "lm")
    AutoTokenizer.from_pretrained(DEMO_LM).save_pretrained(place / "lm")
    backbone = load_backbone(Source(str(place / "lm")))
    raw = SentenceTransformer(
        modules=[backbone, Pooling(backbone.get_embedding_dimension())], device="cpu"
    )
    raw.save_pretrained(str(place / "raw"), create_model_card=False)
    model = st_embfilter.from_causal_lm(place / "lm", device="cpu", show_progress_bar=False)
    st_embfilter.save_pretrained(model, place / "filtered")
    return place / "raw", place / "filtered"


def seconds_to_load(folder: Path) -> float:
    start = time.perf_counter()
    SentenceTransformer(str(folder), device="cpu")
    return time.perf_counter() - start


def seconds_to_import(statement: str, before: str = "") -> float:
    """Of a statement in a fresh process that has run another one before."""
    timed = f"t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    code = f"{before}\nimport time; {timed}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a tiny backbone: the harder case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        raw, filtered = folders(Path(place), arguments.small)
        seconds_to_load(raw), seconds_to_load(filtered)  # files into the cache
        pairs = [(seconds_to_load(raw), seconds_to_load(filtered)) for _ in range(arguments.repeat)]
    ratio = statistics.median(after / before for before, after in pairs)
    print(f"load: raw {min(p[0] for p in pairs):.3f} s, filtered {min(p[1] for p in pairs):.3f} s")
    print(f"      filtered / raw, median of {len(pairs)} pairs: {ratio:.3f}")
    alone = [seconds_to_import("import st_embfilter") for _ in range(arguments.repeat)]
    public = "import st_embfilter; [getattr(st_embfilter, n) for n in st_embfilter.__all__]"
    extra = [
        seconds_to_import(public, "import sentence_transformers") for _ in range(arguments.repeat)
    ]
    print(f"import: st_embfilter alone {1000 * min(alone):.0f} ms; with every public name")
    print(f"        {1000 * statistics.median(extra):.0f} ms after `import sentence_transformers`")


if __name__ == "__main__":
    main()

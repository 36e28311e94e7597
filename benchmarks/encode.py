"""What the filter costs when encoding, and our throughput against the reference's way, in one run.

The model has a real model's shape, random weights and the tokenizer of the demo LM. The reference's
way: batches in the order of the texts, padding on the left, the filter on every token in the
model's dtype, then the last token. Ours is `model.encode`. Both give the same embeddings.

    python benchmarks/encode.py --shape qwen2.5-0.5b

With --depths another table, of a real model: all of its blocks, some of them, and none.

    python -m benchmarks.encode --depths FOLDER --name SmolLM2-135M-Instruct --data DATA --layers 6
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import st_embfilter
from st_embfilter.model.layer import filter_of

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO_LM = REPOSITORY / "examples" / "openstax-lm"
SHAPES = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "small": {
        "model_type": "qwen2",
        "vocab_size": 8_192,
        "hidden_size": 256,
        "intermediate_size": 672,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def checkpoint(shape: str, cache: Path) -> Path:
    """Writes a random bfloat16 checkpoint once; returns its folder."""
    folder = cache / f"encode-{shape}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    options = dict(SHAPES[shape])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(DEMO_LM / name, folder / name)
    model.save_pretrained(folder)
    return folder


def texts(count: int) -> list[str]:
    """Texts of very different lengths, 5 to 200 words, in random order."""
    generator = np.random.default_rng(0)
    lines = (REPOSITORY / "examples" / "data" / "paraphrases.jsonl").read_text().splitlines()
    words = " ".join(t for line in lines for t in json.loads(line)["paraphrases"]).split()
    lengths = np.clip(generator.lognormal(3.5, 0.8, count), 5, 200).astype(int)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def filter_share(model: SentenceTransformer, batches: int) -> tuple[float, float]:
    """Seconds in the filter and in all of encoding; batches of 32 x 64 tokens."""
    layer = filter_of(model)
    started = spent = 0.0

    def before(*_: object) -> None:
        nonlocal started
        synchronize(model.device)
        started = time.perf_counter()

    def after(*_: object) -> None:
        nonlocal spent
        synchronize(model.device)
        spent += time.perf_counter() - started

    longest, model.max_seq_length = model.max_seq_length, 64
    long = [" ".join(["word"] * 100)] * 32
    model.encode(long)
    hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    start = time.perf_counter()
    model.encode(long * batches, batch_size=32)
    total = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    model.max_seq_length = longest
    return spent, total


@torch.inference_mode()
def reference(model: SentenceTransformer, batch: list[str]) -> np.ndarray:
    """The reference's way; see above."""
    tokenizer, backbone = model.tokenizer, model[0].auto_model
    projection = filter_of(model).projection.T.to(backbone.dtype)
    features = tokenizer(
        batch, padding=True, padding_side="left", truncation=True, return_tensors="pt"
    ).to(model.device)
    hidden = backbone(**features).last_hidden_state
    return (hidden @ projection)[:, -1].float().cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--depths", metavar="FOLDER", help="a language model to cut")
    parser.add_argument("--data", type=Path, help="with --depths, as benchmarks/depth.py takes it")
    parser.add_argument("--layers", type=int, action="append", help="with --depths, a depth")
    parser.add_argument("--name", help="with --depths, the model's in docs/depth.jsonl")
    parser.add_argument("--batches", type=int, default=2, help="of 32 x 64 tokens, for the share")
    parser.add_argument("--repeat", type=int, default=1, help="best of N runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the backbone")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "st-embfilter-bench")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    disable_progress_bar()
    if args.depths:
        from benchmarks.shallow import run

        run(args.data, args.depths, args.name, args.layers, args.texts, args.repeat)
        return
    model = st_embfilter.from_causal_lm(
        checkpoint(args.shape, args.cache),
        prompt="prompteol",
        device=args.device,
        dtype=getattr(torch, args.dtype),
        show_progress_bar=False,
    )
    layer = filter_of(model)
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(
        f"{args.shape}: d = {layer.in_features}, k = {layer.out_features}, {args.dtype} on "
        f"{args.device}{threads}"
    )

    shares = [filter_share(model, args.batches) for _ in range(args.repeat)]
    spent, total = min(shares, key=lambda pair: pair[1])
    print(
        f"filter: {1e3 * spent / args.batches:.2f} ms of {1e3 * total / args.batches:.0f} ms for a "
        f"batch of 32 x 64 tokens, {spent / total:.2%} of encoding"
    )

    sample = texts(args.texts)
    parts = [sample[i : i + 32] for i in range(0, len(sample), 32)]
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(args.repeat):
        start = time.perf_counter()
        ours = model.encode(sample, batch_size=32)
        seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = np.concatenate([reference(model, part) for part in parts])
        seconds["reference"].append(time.perf_counter() - start)
    for name, runs in seconds.items():
        print(f"{name + ':':11}{len(sample) / min(runs):8.1f} texts a second")
    ratio = min(seconds["reference"]) / min(seconds["ours"])
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    print(f"ratio: {ratio:.2f}; smallest cosine between the two: {cosine.min():.6f}")


if __name__ == "__main__":
    main()

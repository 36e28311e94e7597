"""Measures how fast a language model writes texts, as `calibrate="self"` does and as it did.

    python -m benchmarks.sampling --model SmolLM2=path/to/folder [--texts 256] [--dtype float16]

"Before" is one batch of 64 in the dtype of the weights, "now" one of 256 in what the CPU is fast
in. The time is that of the processor, so that other work does not count: give it one thread
(OMP_NUM_THREADS=1). Rows go to docs/sampling.jsonl, and from there to docs/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.calibration_page import SAMPLING
from st_embfilter.model.decode import write
from st_embfilter.model.sampling import BATCH, DEFAULT_TOKENS, cpu_dtype, flaws, starts_turn
from st_embfilter.model.tokenizer import start_token

BEFORE = 64


@torch.no_grad()
def before(model: Any, start: int, rows: int, length: int, pad: int) -> torch.Tensor:
    """What was done before: no more than what `generate` does by itself."""
    ids = torch.full((rows, 1), start)
    written: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        pad_token_id=pad,
    )
    return written


def measure(name: str, path: str, dtype: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    start = start_token(tokenizer, model.config)
    if start is None:
        raise SystemExit(f"{name} has no start of a text")
    torch.manual_seed(0)
    begin = time.process_time()
    before(model, start, BEFORE, DEFAULT_TOKENS, ends if isinstance(ends, int) else ends[0])
    then = BEFORE / (time.process_time() - begin)
    model.to(cpu_dtype())
    begin = time.process_time()
    written = write(model, start, BATCH, DEFAULT_TOKENS, ends if isinstance(ends, int) else ends[0])
    now = BATCH / (time.process_time() - begin)
    texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return {
        "model": name,
        "dtype": dtype,
        "computed": str(cpu_dtype()).removeprefix("torch."),
        "tokens": DEFAULT_TOKENS,
        "before": then,
        "now": now,
        "start": tokenizer.convert_ids_to_tokens(start),
        "turn": starts_turn(tokenizer, start),
        "flaws": flaws(texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="NAME=FOLDER")
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--rows", type=Path, default=SAMPLING)
    options = parser.parse_args()
    lines = options.rows.read_text().splitlines() if options.rows.is_file() else []
    rows = {(row["model"], row["dtype"]): row for row in map(json.loads, lines)}
    for model in options.model:
        name, _, path = model.partition("=")
        for dtype in options.dtype or ["float16", "bfloat16", "float32"]:
            rows[name, dtype] = measure(name, path, dtype)
            print(json.dumps(rows[name, dtype]), flush=True)
            options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


if __name__ == "__main__":
    main()

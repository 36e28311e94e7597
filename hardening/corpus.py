"""Kill the encoding of a corpus at random points; go on until it is done; compare the bytes.

python -m hardening.corpus [KILLS]
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import st_embfilter
from tests.conftest import contents, tiny_lm

#: Of the time that the whole file takes: the longest before the first kill. After each worker that
#: was done before its kill the next ones come sooner, after each kill later: about one worker of
#: six gets to the end, however busy the machine is, and kills fall on every part of a folder.
LONGEST = 1 / 3
SOONER, LATER = 0.7, 1.07

#: Forks a worker for each folder that it reads, so that imports are paid for once.
FORKER = """
import os, sys, warnings
warnings.simplefilter("ignore")
import pyarrow.parquet, torch, st_embfilter
from st_embfilter.corpus import work
torch.set_num_threads(1)
work.WINDOW = 64
place = sys.argv[1]
model = st_embfilter.load(f"{place}/model", device="cpu")
for line in sys.stdin:
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            st_embfilter.encode_corpus(
                model, [f"{place}/texts.jsonl"], line.strip(), id="id", dims=[1.0, 0.25],
                precision="int8", npy=True, batch_size=16, shard_rows=150, show_progress_bar=False,
            )
            code = 0
        finally:
            os._exit(code)
    print(worker, flush=True)
    print(os.waitpid(worker, 0)[1], flush=True)
"""


def prepare(place: Path) -> None:
    """A tiny filtered model, and 3,000 rows of which every 97th is bad."""
    tiny_lm(place / "lm")
    model = st_embfilter.from_causal_lm(
        place / "lm", keep=16, device="cpu", show_progress_bar=False
    )
    st_embfilter.save_pretrained(model, place / "model")
    generator = random.Random(0)
    with (place / "texts.jsonl").open("w") as file:
        for i in range(3000):
            words = [f"w{generator.randrange(180)}" for _ in range(generator.randrange(1, 40))]
            text = None if i % 97 == 96 else " ".join(words)
            file.write(json.dumps({"id": f"k{i}", "text": text}) + "\n")


def corpus_kills(count: int) -> Counter[str]:
    """Kills that many encoders.

    Returns:
        How many were killed, and in which quarter of the shards; folders finished, shards lost
        after a kill, folders that differ from the uninterrupted one, and encoders that failed by
        themselves.
    """
    generator = random.Random(0)
    found: Counter[str] = Counter()
    place = Path(tempfile.mkdtemp(prefix="st-embfilter-corpus-"))
    try:
        prepare(place)
        forker = subprocess.Popen(
            [sys.executable, "-c", FORKER, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        assert forker.stdin is not None
        assert forker.stdout is not None

        def worker(target: Path, wait: float | None) -> int:
            """The status of a process that was killed after that time, if it still ran."""
            assert forker.stdin is not None
            assert forker.stdout is not None
            forker.stdin.write(f"{target}\n")
            forker.stdin.flush()
            child = int(forker.stdout.readline())
            if wait is not None:
                time.sleep(wait)
                with suppress(ProcessLookupError):  # it was done
                    os.kill(child, signal.SIGKILL)
            return int(forker.stdout.readline())

        start = time.monotonic()
        found["failed"] += worker(place / "whole", None) != 0
        longest = LONGEST * (time.monotonic() - start)
        whole = contents(place / "whole")
        shards = len(list((place / "whole").glob("shard-*")))
        while found["killed"] < count:
            target = place / f"target{found['finished']}"
            before = {path.name for path in target.glob("shard-*")}
            status = worker(target, generator.uniform(0.0, longest))
            after = {path.name for path in target.glob("shard-*")}
            longest *= SOONER if status == 0 else LATER
            if status == signal.SIGKILL:
                found["killed"] += 1
                found[f"quarter {min(4, 1 + 4 * len(after) // shards)}"] += 1
            found["failed"] += status not in (0, signal.SIGKILL)
            found["lost"] += len(before - after)
            if status == 0 or (target / "_manifest.json").exists():
                found["failed"] += worker(target, None) != 0
                found["finished"] += 1
                found["different"] += contents(target) != whole
                shutil.rmtree(target)
        if (target := place / f"target{found['finished']}").exists():
            found["failed"] += worker(target, None) != 0
            found["finished"] += 1
            found["different"] += contents(target) != whole
        forker.kill()
        forker.wait()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


if __name__ == "__main__":
    result = corpus_kills(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    print(dict(result))
    sys.exit(int(result["lost"] + result["different"] + result["failed"] > 0))

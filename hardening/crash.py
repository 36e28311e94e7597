"""Kill saves, builds and pushes at random points and look at what is left.

Workers run one action after another; each is killed by SIGKILL after a random time. The target must
then be the old model or the complete new one, and a repository without a half commit.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import st_embfilter
from st_embfilter.files.staging import staged
from tests.conftest import contents, tiny_lm
from tests.hub_server import TOKEN, LocalHub

#: Of the time that a build with its save takes on this machine: the longest before a kill.
LONGEST = 3.0

#: Forks a worker for each line "action target" that it reads, so that imports are paid for once.
FORKER = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch, st_embfilter
torch.set_num_threads(1)
source = sys.argv[1]
models = [st_embfilter.load(f"{source}/{name}", device="cpu") for name in ("one", "two")]

def work(action, target):
    for turn in range(10**9):
        if action == "save":
            st_embfilter.save_pretrained(models[turn % 2], target, overwrite=True)
        elif action == "build":
            model = st_embfilter.from_causal_lm(
                f"{source}/lm", keep=16 - 8 * (turn % 2), device="cpu", show_progress_bar=False
            )
            st_embfilter.save_pretrained(model, target, overwrite=True)
        else:
            st_embfilter.push_to_hub(models[turn % 2], target)

for line in sys.stdin:
    worker = os.fork()
    if worker == 0:
        try:
            work(*line.split())
        finally:
            os._exit(1)  # an error: only a kill ends the work
    print(worker, flush=True)
    print(os.waitpid(worker, 0)[1], flush=True)
"""


def digest(files: dict[str, bytes]) -> str:
    """Of names and contents; without the card, which names the repository."""
    found = hashlib.sha256()
    for name, content in sorted(files.items()):
        if name not in ("README.md", ".gitattributes"):
            found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()


def prepare(place: Path) -> set[str]:
    """A language model and two filtered models of it; returns their digests."""
    tiny_lm(place / "lm")
    for name, keep in (("one", 16), ("two", 8)):
        model = st_embfilter.from_causal_lm(
            place / "lm", keep=keep, device="cpu", show_progress_bar=False
        )
        st_embfilter.save_pretrained(model, place / name)
    return {digest(contents(place / name)) for name in ("one", "two")}


def seconds_of_a_build(place: Path) -> float:
    """What a build and its save take, once everything is imported."""
    start = time.perf_counter()
    model = st_embfilter.from_causal_lm(place / "lm", device="cpu", show_progress_bar=False)
    st_embfilter.save_pretrained(model, place / "timed")
    return time.perf_counter() - start


def start(place: Path, endpoint: str) -> subprocess.Popen[str]:
    """The process that forks workers, with a Hub of this machine."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    (place / "tmp").mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", FORKER, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )


def kill_at_random(forker: subprocess.Popen[str], action: str, target: str, longest: float) -> bool:
    """One worker, killed within that many seconds; whether the kill is what ended it."""
    assert forker.stdin is not None
    assert forker.stdout is not None
    forker.stdin.write(f"{action} {target}\n")
    forker.stdin.flush()
    worker = int(forker.stdout.readline())
    time.sleep(random.uniform(0.0, longest))
    os.kill(worker, signal.SIGKILL)
    return int(forker.stdout.readline()) == signal.SIGKILL


def crashes(count: int) -> Counter[str]:
    """Kills that many workers: half of them saving, the others building and pushing.

    Returns:
        How often each was killed, and how often something was lost.
    """
    random.seed(0)
    found: Counter[str] = Counter()
    place = Path(tempfile.mkdtemp(prefix="st-embfilter-crash-"))
    try:
        whole = prepare(place)
        longest = LONGEST * seconds_of_a_build(place)
        with LocalHub().running() as hub:
            forker = start(place, hub.url)
            for turn in range(count):
                action = ("save", "build", "save", "push")[turn % 4]
                target = place / "targets" / action
                before = digest(contents(target)) if target.exists() else ""
                where = "me/crash" if action == "push" else str(target)
                by_kill = kill_at_random(forker, action, where, longest)
                found[f"{action} killed" if by_kill else f"{action} failed"] += 1
                if action == "push":
                    files = hub.repos["me/crash"].files if "me/crash" in hub.repos else {}
                    good = not set(files) - {".gitattributes"} or digest(files) in whole
                    found["commits"] = len(hub.repos["me/crash"].commits) if files else 0
                else:
                    good = digest(contents(target)) in whole if target.exists() else not before
                    found["another model after the kill"] += digest(contents(target)) != before
                found["lost"] += not good
            forker.kill()
            forker.wait()
            for action in ("save", "build"):
                target = place / "targets" / action
                found["left by killed processes"] += sum(
                    path != target for path in target.parent.glob(f".{action}.*")
                )
                with staged(target, overwrite=True) as folder:
                    shutil.copytree(place / "one", folder, dirs_exist_ok=True)
                found["left after the next save"] += len(list(target.parent.glob(f".{action}.*")))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(dict(crashes(int(sys.argv[1]) if len(sys.argv) > 1 else 200)))

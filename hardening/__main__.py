"""Everything that the library must survive, and one summary of it.

    python -m hardening                             # all of it, minutes
    python -m hardening --kills 20 --texts 10000    # the part for CI
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

ROOT = Path(__file__).parents[1]

#: What pytest runs: the table of hostile models, the fuzzers, folders, verification, use, bytes.
TESTS = ("hostile", "fuzz", "folders", "verify", "use", "determinism")

#: Growth of the resident memory that counts as flat, in MiB.
GROWTH = 5.0


def pytest(name: str) -> tuple[int, int]:
    """Runs one file of tests; returns how many passed and how many did not."""
    print(f"tests/test_{name}.py ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, f"tests/test_{name}.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error)", last)}
    bad = counts.get("failed", 0) + counts.get("error", 0)
    if done.returncode and not bad:
        bad = 1
    if bad:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    return counts.get("passed", 0), bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hardening", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes killed at random")
    parser.add_argument("--texts", type=int, default=200_000, help="texts of the soak")
    args = parser.parse_args()
    started = time.monotonic()

    from hardening.crash import crashes
    from hardening.disk import disks
    from hardening.inputs import inputs
    from hardening.soak import soak
    from tests.test_fuzz import FUZZ

    results = {name: pytest(name) for name in TESTS}
    print("hostile models ...", flush=True)
    models = inputs()
    print("kills ...", flush=True)
    killed = crashes(args.kills)
    print("disks ...", flush=True)
    disk = disks()
    print(f"soak with {args.texts:,} texts ...", flush=True)
    memory = soak(args.texts)

    executed = models["code executed"]
    fuzzers = results["fuzz"][0]
    survived = sum(count for what, count in killed.items() if what.endswith("killed"))
    lost = killed["lost"] + disk["lost"]
    growth = memory["highest"] - memory["start"]
    failed = sum(bad for _, bad in results.values()) + models["failed"]
    failed += sum(count for what, count in killed.items() if what.endswith("failed"))
    failed += killed["left after the next save"]
    failed += disk["tried"] - disk["clear errors"] + disk["left over"]
    failed += survived != args.kills
    print(
        f"\ninputs tried      {models['tried']} hostile models ({models['refused']} refused), {fuzzers} fuzzers of "
        f"{FUZZ.max_examples} examples\n"
        f"tests passed      {sum(good for good, _ in results.values())} "
        f"({', '.join(f'{name} {good}' for name, (good, _) in results.items())})\n"
        f"crashes survived  {survived} of {args.kills} kills "
        f"({', '.join(f'{a} {killed[f'{a} killed']}' for a in ('save', 'build', 'push'))}; "
        f"{killed['another model after the kill']} had written a new model, "
        f"{killed['commits']} commits pushed)\n"
        f"disks             {disk['tried']} tried, {disk['clear errors']} clear errors, "
        f"{disk['skipped']} skipped\n"
        f"left over         {killed['left by killed processes']} folders of killed processes, "
        f"{killed['left after the next save']} after the next save\n"
        f"memory            {growth:+.1f} MiB over {args.texts:,} texts "
        f"({memory['start']:.0f} -> {memory['end']:.0f} MiB)\n"
        f"data lost         {lost}\n"
        f"code executed     {executed}\n"
        f"failures          {failed}\n"
        f"time              {(time.monotonic() - started) / 60:.1f} minutes"
    )
    return int(failed + lost + executed + (growth > GROWTH) > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Everything that the library must survive, and one summary of it.

python -m hardening                                         # all of it, minutes
python -m hardening --kills 20 --texts 10000 --no-tests     # the part for CI
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

ROOT = Path(__file__).parents[1]

#: What pytest runs: the table of hostile models, the fuzzers, folders, verification, use, bytes.
TESTS = ("hostile", "strangers", "fuzz", "staging", "verify", "checks", "use", "determinism")

PAGE = ROOT / "docs" / "hardening.md"
TEXT = """\
# What the library survived

Written by `make hardening HARDENING=--write`.

```
{summary}
```

- **inputs**: malformed and malicious checkpoints, filters and saved models (`tests/hostile.py`).
  Each must end in one error of the library, write nothing and run no code. *Attacks*: changes to a
  good folder that still loads, or nearly does (`tests/saved/test_verify.py`); `verify` must find
  each.
- **crashes**: processes that save over a model, build one or push one, killed by SIGKILL at a
  random moment. The folder, or the repository of a local Hub, must then hold the old model or the
  complete new one. *had written*: the kill found another model than the one before. The next save
  removes what killed processes left.
- **corpora**: processes that encode a file into shards, killed by SIGKILL at a random moment and
  started again until they are done. The folder must then be that of an uninterrupted run, byte for
  byte, and no shard that was finished may go. *by quarters*: how much of the folder was there.
- **bad disks**: a full tmpfs and one mounted read-only, with an old model on them.
- **memory**: growth of the resident memory while short texts are encoded in a loop, after a
  warm-up of 20,000; at most 5 MiB.
- **tests**: also two processes that save to one folder, threads, process pools, compilation,
  lower precision, training, and builds that must give the same bytes.
"""

#: What a report of pytest counts.
COUNTS = ("tests", "skipped", "failures", "errors")

#: Growth of the resident memory that counts as flat, in MiB.
GROWTH = 5.0


def pytest(name: str) -> tuple[int, int]:
    """Runs one file of tests; returns how many passed, and how many did not or could not run."""
    file = next((ROOT / "tests").rglob(f"test_{name}.py")).relative_to(ROOT)
    print(f"{file} ...", flush=True)
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", str(file), f"--junitxml={report}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        suites = ElementTree.parse(report).iter("testsuite") if report.exists() else ()
        counts = Counter[str]()
        for suite in suites:
            counts.update({what: int(suite.get(what, 0)) for what in COUNTS})
    bad = counts["failures"] + counts["errors"]
    passed = counts["tests"] - counts["skipped"] - bad
    if done.returncode or not passed:
        bad = max(bad, 1)
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
    return passed, bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hardening", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="processes killed at random")
    parser.add_argument("--texts", type=int, default=200_000, help="texts of the soak")
    parser.add_argument("--no-tests", action="store_true", help="leave out what pytest runs")
    parser.add_argument("--write", action="store_true", help="also write docs/hardening.md")
    args = parser.parse_args()
    started = time.monotonic()

    from hardening.corpus import corpus_kills
    from hardening.crash import crashes
    from hardening.disk import disks
    from hardening.inputs import inputs
    from hardening.soak import soak
    from tests.test_fuzz import FUZZ

    results = {} if args.no_tests else {name: pytest(name) for name in TESTS}
    print("hostile models ...", flush=True)
    models = inputs()
    print("kills ...", flush=True)
    killed = crashes(args.kills)
    print("kills of encoders ...", flush=True)
    encoders = corpus_kills(args.kills)
    print("disks ...", flush=True)
    disk = disks()
    print(f"soak with {args.texts:,} texts ...", flush=True)
    memory = soak(args.texts)

    executed = models["code executed"]
    survived = sum(count for what, count in killed.items() if what.endswith("killed"))
    lost = killed["lost"] + disk["lost"]
    growth = memory["highest"] - memory["start"]
    failed = sum(bad for _, bad in results.values()) + models["failed"]
    failed += sum(count for what, count in killed.items() if what.endswith("failed"))
    failed += killed["left after the next save"]
    failed += disk["tried"] - disk["clear errors"] + disk["left over"]
    failed += survived != args.kills
    failed += encoders["failed"] + encoders["different"]
    lost += encoders["lost"]
    killed_at = ", ".join(
        f"{action} {killed[action + ' killed']}" for action in ("save", "build", "push")
    )
    rows = {
        "inputs tried": f"{models['tried']} hostile models ({models['refused']} refused), "
        f"{models['attacks']} attacks on a good one ({models['found by verify']} found by verify)"
        + (f", {results['fuzz'][0]} fuzzers of {FUZZ.max_examples}" if results else ""),
        "tests passed": f"{sum(good for good, _ in results.values())}: "
        + ", ".join(f"{name} {good}" for name, (good, _) in results.items()),
        "crashes survived": f"{survived} of {args.kills} kills: {killed_at}; "
        f"{killed['another model after the kill']} had written, {killed['commits']} pushed",
        "left over": f"{killed['left by killed processes']} folders of killed processes, "
        f"{killed['left after the next save']} after the next save",
        "corpora": f"{encoders['killed']} kills of encoders, "
        + "/".join(str(encoders[f"quarter {n}"]) for n in range(1, 5))
        + f" by quarters of the shards, {encoders['finished']} folders done, "
        f"{encoders['different']} of other bytes than the uninterrupted one",
        "bad disks": f"{disk['tried']}, {disk['clear errors']} clear errors"
        + (f", {disk['skipped']} skipped (mount needs root)" if disk["skipped"] else ""),
        "memory": f"{growth:+.1f} MiB over {args.texts:,} texts "
        f"({memory['start']:.0f} -> {memory['end']:.0f} MiB)",
        "data lost": lost,
        "code executed": executed,
        "failures": failed,
        "time": f"{(time.monotonic() - started) / 60:.1f} minutes",
    }
    if not results:
        del rows["tests passed"]
    summary = "\n".join(f"{name:17} {value}" for name, value in rows.items())
    print(f"\n{summary}")
    if args.write:
        PAGE.write_text(TEXT.format(summary=summary))
    return int(failed + lost + executed + (growth > GROWTH) > 0)


if __name__ == "__main__":
    sys.exit(main())

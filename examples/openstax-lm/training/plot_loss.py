"""Draws the loss of a run beside the bundled model's, and prints the difference.

    python plot_loss.py run/log.jsonl --output loss.png

Without a run it draws the bundled model's log alone. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

BUNDLED = Path(__file__).with_name("training-log.jsonl")

Curve = dict[int, float]


def curve(log: Path, key: str) -> Curve:
    """The values that a log has under a key, by step."""
    entries = map(json.loads, log.read_text().splitlines())
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def draw(runs: dict[str, Path], output: Path) -> None:
    """Writes a figure of moving averages (lines) and held-out losses (rings) over steps."""
    with mpl.rc_context({"font.size": 10}):
        figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for number, (name, log) in enumerate(runs.items()):
            averages, heldout = curve(log, "average"), curve(log, "heldout_loss")
            style = "o-" if len(averages) < 50 else "-"
            axes.plot(
                list(averages), list(averages.values()), style, ms=4, color=f"C{number}", label=name
            )
            axes.plot(
                list(heldout),
                list(heldout.values()),
                "o",
                ms=8,
                mfc="none",
                color=f"C{number}",
                label=f"{name}, held out",
            )
        axes.set_xlabel("step (8,192 tokens each)")
        axes.set_ylabel("cross-entropy, nats a token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(output)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, nargs="?", help="log.jsonl of train.py")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), metavar="FILE")
    args = parser.parse_args()
    runs = {"bundled": BUNDLED}
    if args.log:
        runs["this run"] = args.log
        bundled, here = curve(BUNDLED, "average"), curve(args.log, "average")
        print(f"{'step':>6} {'bundled':>9} {'this run':>9} {'difference':>11}")
        for step in sorted(set(bundled) & set(here)):
            difference = here[step] - bundled[step]
            print(f"{step:6,} {bundled[step]:9.2f} {here[step]:9.2f} {difference:+11.2f}")
    draw(runs, args.output)


if __name__ == "__main__":
    main()

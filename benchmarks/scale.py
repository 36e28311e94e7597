"""Time, cost and bytes of a corpus, from a measured rate.

python -m benchmarks.scale RATE --dims 288 --bytes 4 --price 0.05 --workers 1 100 1000

RATE is texts a second of one worker (a core, or a GPU), as `python -m benchmarks.corpus` prints it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

SIZES = (10**7, 10**9, 10**11)


@dataclass(frozen=True)
class Plan:
    """What a corpus takes.

    Attributes:
        hours: On the clock: texts / (rate x workers) / 3600.
        cost: texts / rate / 3600 x price of a worker's hour; more workers cost the same.
        output: Bytes of the vectors: texts x (dims x bytes of a number + 8 of an id).
        eighth: The same for the first eighth of each vector, what a search holds in memory.
        written: Bytes a second that the storage must take.
    """

    hours: float
    cost: float
    output: float
    eighth: float
    written: float


def plan(
    texts: int,
    rate: float,
    *,
    dims: int,
    number: float = 4.0,
    price: float = 0.05,
    workers: int = 1,
) -> Plan:
    """Computes it.

    Args:
        texts: Their number.
        rate: Texts a second of one worker.
        dims: Width of a vector.
        number: Bytes of one of its numbers: 4, 2, 1, or 0.125 for binary.
        price: Of a worker's hour.
        workers: At work at a time.
    """
    seconds = texts / (rate * workers)
    output = texts * (dims * number + 8)
    eighth = texts * (dims // 8 * number + 8)
    return Plan(seconds / 3600, texts / rate / 3600 * price, output, eighth, output / seconds)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} PB"


def duration(hours: float) -> str:
    """Hours for people."""
    if hours < 48:
        return f"{hours:.2g} h"
    return f"{hours / 24:.3g} days" if hours < 24 * 730 else f"{hours / 24 / 365:,.0f} years"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rate", type=float, help="texts a second of one worker")
    parser.add_argument("--dims", type=int, default=288)
    parser.add_argument("--bytes", type=float, default=4.0, help="of one number: 4, 2, 1, 0.125")
    parser.add_argument("--price", type=float, default=0.05, help="of a worker's hour")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 100, 10_000])
    args = parser.parse_args()
    print("| texts | workers | time | cost | vectors | first eighth | written a second |")
    print("|-:|-:|-:|-:|-:|-:|-:|")
    for texts in SIZES:
        for workers in args.workers:
            found = plan(
                texts,
                args.rate,
                dims=args.dims,
                number=args.bytes,
                price=args.price,
                workers=workers,
            )
            print(
                f"| {texts:,} | {workers:,} | {duration(found.hours)} | {found.cost:,.2f} "
                f"| {size(found.output)} | {size(found.eighth)} | {size(found.written)} |"
            )


if __name__ == "__main__":
    main()

"""Encode texts in a loop and watch the memory of the process.

python -m hardening.soak 200000
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path

import st_embfilter
from tests.conftest import tiny_lm

BATCH = 2_000

#: Texts before the memory is first read: allocators fill their pools.
WARM_UP = 20_000


def resident_mib() -> float:
    """Resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def soak(count: int) -> dict[str, float]:
    """Encodes that many short texts.

    Returns:
        The resident memory after the warm-up and at the end, and the largest seen between, in MiB.
    """
    with tempfile.TemporaryDirectory(prefix="st-embfilter-soak-") as place:
        tiny_lm(Path(place) / "lm")
        model = st_embfilter.from_causal_lm(
            Path(place) / "lm", normalize=True, device="cpu", show_progress_bar=False
        )
        start = highest = 0.0
        for done in range(0, WARM_UP + count, BATCH):
            if done == WARM_UP:
                gc.collect()
                start = highest = resident_mib()
            # Every text is new, and lengths vary as they do in a server.
            texts = [f"w{i % 150} tea w{i % 89} {'light ' * (i % 7)}{i}" for i in range(BATCH)]
            model.encode(texts, batch_size=32, show_progress_bar=False)
            if done >= WARM_UP:
                highest = max(highest, resident_mib())
        gc.collect()
        return {"start": start, "highest": highest, "end": resident_mib()}


if __name__ == "__main__":
    found = soak(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
    print({name: round(value, 1) for name, value in found.items()})

"""The table of hostile models, one after another, with what came of each."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from st_embfilter.errors import EmbedFilterError
from tests.hostile import CANARY, CHECKPOINTS, FILTERS, good_models


def inputs() -> Counter[str]:
    """Opens every hostile model.

    Returns:
        How many were tried, refused by one clear error, failed otherwise, and ran code.
    """
    found: Counter[str] = Counter()
    home = Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="st-embfilter-inputs-"))
    try:
        good = good_models(place / "good")
        (place / "work").mkdir()
        os.chdir(place / "work")
        for case in CHECKPOINTS + FILTERS:
            folder = place / "model"
            case.spoil(good, folder)
            found["tried"] += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    case.attempt(folder)
                found["failed"] += 1  # it was accepted
            except EmbedFilterError:
                found["refused"] += 1
            except Exception:  # any other error is what is looked for
                found["failed"] += 1
            if Path(CANARY).exists():
                found["code executed"] += 1
                Path(CANARY).unlink()
            shutil.rmtree(folder)
    finally:
        os.chdir(home)
        shutil.rmtree(place, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(dict(inputs()))

"""The table of hostile models, one after another, with what came of each."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from st_embfilter.errors import EmbedFilterError
from st_embfilter.saved.verify import verify
from tests.hostile import CANARY, CHECKPOINTS, FILTERS, good_models
from tests.saved.test_verify import ATTACKS


def inputs() -> Counter[str]:
    """Opens every hostile model.

    Returns:
        How many were tried, refused by one clear error, failed otherwise, and ran code; and how
        many attacks on a good folder were made and found.
    """
    found: Counter[str] = Counter()
    home = Path.cwd()
    place = Path(tempfile.mkdtemp(prefix="st-embfilter-inputs-"))
    try:
        good = good_models(place / "good")
        (place / "work").mkdir()
        os.chdir(place / "work")
        folder = place / "model"
        for case in CHECKPOINTS + FILTERS:
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
            _look_for_code(found)
            shutil.rmtree(folder)
        for attack, _ in ATTACKS.values():
            shutil.copytree(good / "saved", folder)
            attack(folder)
            found["attacks"] += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    checks = verify(folder, show_progress_bar=False)
                found["found by verify"] += any(check.passed is False for check in checks)
            except Exception:  # verify never raises for a stranger's folder
                found["failed"] += 1
            _look_for_code(found)
            shutil.rmtree(folder)
        found["failed"] += found["attacks"] - found["found by verify"]
    finally:
        os.chdir(home)
        shutil.rmtree(place, ignore_errors=True)
    return found


def _look_for_code(found: Counter[str]) -> None:
    if Path(CANARY).exists():
        found["code executed"] += 1
        Path(CANARY).unlink()


if __name__ == "__main__":
    print(dict(inputs()))

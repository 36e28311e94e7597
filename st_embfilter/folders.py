"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from st_embfilter.errors import OutputError

#: A folder with one of these is a model or a filter of ours, which may be overwritten.
_OURS = ("modules.json", "embfilter.json")


@contextmanager
def staged(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside the target that is renamed to it at the end, or removed on an error.

    Raises:
        OutputError: If the target is not empty, or cannot be written.
    """
    target = Path(target).absolute()
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        )
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield staging
        staging.chmod(0o755)
        _replace(staging, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be written, before any work is done for it.

    Raises:
        OutputError: If it exists and is not empty, or is no model folder to overwrite.
    """
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise OutputError(
                f"the output folder must be missing or empty, got {target} with files in it; "
                "choose another or pass overwrite (--overwrite)"
            )
        if not any((target / file).is_file() for file in _OURS):
            raise OutputError(
                f"only a model folder (with {' or '.join(_OURS)}) is overwritten, got {target}; "
                "remove it yourself if you mean it"
            )
    elif target.exists():
        raise OutputError(f"the output must be a folder, got the file {target}")


def _replace(staging: Path, target: Path) -> None:
    """Renames the complete folder into place."""
    if not target.is_dir() or not any(target.iterdir()):
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old)  # onto an empty folder
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)

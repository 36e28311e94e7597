"""Folders that appear complete or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape as glob_escape
from pathlib import Path
from typing import BinaryIO, Final

from safetensors import SafetensorError

from st_embfilter.errors import EmbedFilterError, OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: What a folder with an exported graph holds beside it.
EXPORT_FILE: Final = "embfilter_onnx.json"

#: A folder with one of these is a model or a filter of ours, which may be overwritten.
_OURS: Final = ("modules.json", "embfilter.json", EXPORT_FILE)

#: What `mkdtemp` puts into a name.
_UNIQUE: Final = re.compile(r"\.[a-z0-9_]{8}$")

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


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
        _clean(target)
        staging, lock = _new_staging(target)
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        yield staging
        staging.chmod(0o755)
        check_target(target, overwrite=overwrite)  # others may have written meanwhile
        _replace(staging, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:  # its I/O errors are no OSError
        raise OutputError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_file(file: Path) -> None:
    """Makes the folder of a file that is to be written, and checks that it can be.

    Raises:
        OutputError: If the file is a folder, or its folder cannot be written to.
    """
    try:
        if os.path.isdir(file):
            raise OutputError(f"the output must be a file, got the folder {file}")
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.absolute().parent):
            pass
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # a name too long, without rights, with a NUL
        raise OutputError(f"cannot write {file}: {error}") from error


@contextmanager
def written_file(target: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file beside the target that is renamed to it at the end, or removed on an error.

    Raises:
        OutputError: If the target is a folder, is there already, or cannot be written.
    """
    if os.path.isdir(target) or (os.path.exists(target) and not overwrite):
        raise OutputError(
            f"the output must be a file that is not there yet, got {target}; choose another or "
            "pass overwrite (--overwrite)"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as out:
                yield out
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        if isinstance(error, EmbedFilterError):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that it is there whole or as it was; a link of that name is replaced itself.

    Raises:
        OutputError: If it cannot be written.
    """
    path = Path(path)
    # A name that nobody can have prepared, and never one that is there.
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_target(target: Path, *, overwrite: bool) -> None:
    """Checks that a folder may be written, before any work is done for it.

    Raises:
        OutputError: If it exists and is not empty, or is no model folder to overwrite.
    """
    if os.path.isdir(target):  # False, where pathlib fails at a name too long
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
    elif os.path.exists(target):
        raise OutputError(f"the output must be a folder, got the file {target}")


def _new_staging(target: Path) -> tuple[Path, int | None]:
    """A hidden folder beside the target, and the lock that says it is in use.

    The lock goes with the process, however that ends. A folder gets its suffix when it is locked.
    """
    while True:
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        lock = _lock(fresh)
        # Another process may have cleaned it away before it was locked.
        with suppress(FileNotFoundError):
            return fresh.rename(fresh.with_suffix(".tmp")), lock
        if lock is not None:
            os.close(lock)


def _clean(target: Path) -> None:
    """Removes what killed processes left beside the target; puts back what they took away."""
    for folder in target.parent.glob(f".{glob_escape(target.name)}.*"):
        if folder.suffix not in (".new", ".tmp", ".old") or not _UNIQUE.search(folder.stem):
            continue
        lock = _lock(folder)
        if lock is None:
            continue
        try:
            if folder.suffix == ".old" and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder; None if another process has it, or the system knows no such locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _replace(staging: Path, target: Path) -> None:
    """Renames the complete folder into place."""
    if not target.is_dir() or not any(target.iterdir()):
        staging.rename(target)
    elif not _exchange(staging, target):
        old = staging.with_suffix(".old")
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step, so that at no time there is none; False if it cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return done == 0

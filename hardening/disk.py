"""Targets that cannot be written: a full disk and a read-only one, real ones where they can be had.

python -m hardening.disk
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import st_embfilter
from hardening.crash import digest, prepare
from st_embfilter.errors import OutputError
from tests.conftest import contents

SIZE_KIB = 512


def mount(*arguments: str) -> bool:
    """Runs mount; False where that is not allowed."""
    command = shutil.which("mount")
    return (
        command is not None
        and not subprocess.run([command, *arguments], capture_output=True, check=False).returncode
    )


@contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A tmpfs of `SIZE_KIB`; gives whether it could be mounted, which takes root."""
    place.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(place))
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def refused(source: Path, target: Path) -> str | None:
    """The error of a save that must fail; None if it did not."""
    model = st_embfilter.load(source, device="cpu")
    try:
        st_embfilter.save_pretrained(model, target, overwrite=True)
    except OutputError as error:
        return str(error)
    return None


def no_vectors(source: Path, target: Path) -> str | None:
    """The error of an encoding that must fail; None if it did not."""
    texts = source.parent / "texts.txt"
    texts.write_text("the tea\n" * 1000)
    try:
        st_embfilter.encode_corpus(
            source, [texts], target, devices=["cpu"], show_progress_bar=False
        )
    except OutputError as error:
        return str(error)
    return None


def disks() -> Counter[str]:
    """Saves onto a full and a read-only disk, over an old model.

    Returns:
        How many were tried, said so clearly, lost something, or were skipped for want of rights.
    """
    found: Counter[str] = Counter()
    place = Path(tempfile.mkdtemp(prefix="st-embfilter-disk-"))
    try:
        prepare(place)
        with small_disk(place / "disk") as mounted:
            if not mounted:
                found["skipped"] = 4
                return found
            target = place / "disk" / "model"
            shutil.copytree(place / "one", target)
            before = digest(contents(target))
            free = os.statvfs(target)
            (place / "disk" / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - 2**14))
            for state, says in (("full", "No space left"), ("read-only", "Read-only file system")):
                if state == "read-only":
                    mount("-o", "remount,ro", str(place / "disk"))
                message = refused(place / "two", target)
                found["tried"] += 1
                found["clear errors"] += message is not None and says in message
                whole = digest(contents(target)) == before
                found["lost"] += not whole
                message = no_vectors(place / "two", place / "disk" / "corpus")
                found["tried"] += 1
                found["clear errors"] += message is not None and says in message
                found["left over"] += sum(
                    path.name not in ("model", "ballast", "corpus")
                    for path in (place / "disk").iterdir()
                )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(dict(disks()))

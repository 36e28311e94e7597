"""The files of one model, wherever they are; those of a folder, and links out of it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

from st_embfilter.errors import FormatError, LinkError
from st_embfilter.files.stored import LocalSafetensors, SafetensorsFile
from st_embfilter.text import shown


class ModelFiles(ABC):
    """The files of one model, in a folder or on the Hub.

    Attributes:
        name: Folder or Hub id.
        where: Names the model in errors.
    """

    name: str
    where: str

    @property
    def commit(self) -> str | None:
        """Hash of the commit on the Hub, as soon as a file was found; None for a folder."""
        return None

    @abstractmethod
    def path(self, file: str) -> Path | None:
        """A local copy of the file, downloaded if need be; None if the model has no such file."""

    @abstractmethod
    def open(self, file: str) -> SafetensorsFile | None:
        """A safetensors file to read from without downloading it; None if there is none."""


class FolderFiles(ModelFiles):
    """The files of a model in a local folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.name = self.where = str(folder)

    def path(self, file: str) -> Path | None:
        """The file's path.

        Raises:
            LinkError: If it is a symbolic link out of the folder.
        """
        path = self._folder / file
        try:
            if not path.is_file():
                return None
        except (OSError, ValueError):  # a name that no file can have
            return None
        check_inside(path, self._folder)
        return path

    def open(self, file: str) -> SafetensorsFile | None:
        """The file on disk."""
        path = self.path(file)
        return None if path is None else LocalSafetensors(path)


def check_inside(path: Path, folder: Path) -> None:
    """Checks that a file of a model folder lies in it, links resolved.

    A link could make a model of a stranger read, and a saved copy of it publish, any file of this
    machine. Links within a repository of the Hub cache are how that cache works.

    Raises:
        LinkError: If it is a symbolic link out of the folder.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[1]
    if not path.resolve().is_relative_to(root):
        raise LinkError(
            f"every file of a model must lie in its folder, got the symbolic link {path} out of "
            "it; put the file itself there"
        )


def check_plain(folder: Path) -> None:
    """Checks that a model folder holds files and folders: whoever opens a pipe waits for ever.

    Raises:
        FormatError: Names what is neither.
    """
    for path in folder.rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FormatError(
                f"a model folder must hold files and folders, got something else: {shown(path)}"
            )


def links_out(folder: Path) -> list[str]:
    """Files and folders in a model folder that are links out of it."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            try:
                check_inside(path, folder)
            except (LinkError, OSError, RuntimeError):
                found.append(path.relative_to(folder).as_posix())
    return found

"""Whether a model is a filtered one, and which filter it holds; for folders and the Hub alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE, parse_modules
from st_embfilter.unembedding.source import Source

#: The class of the filter in the form that sentence-transformers itself saves.
_LAYER: Final = "EmbedFilterLayer"

#: The portable form, that of sentence-transformers' own saving, and a filter without a model.
Form = Literal["portable", "package", "alone"]


@dataclass(frozen=True)
class FoundFilter:
    """A saved filter.

    Attributes:
        form: How it is saved.
        metadata: What it was made from.
        metadata_folder: Where its metadata and spectrum lie: "" or a folder with a slash.
        weights_folder: Where its weights lie, likewise.
    """

    form: Form
    metadata: FilterMetadata
    metadata_folder: str
    weights_folder: str


def find_filter(source: Source) -> FoundFilter | None:
    """The filter of a model, or a filter alone; None if there is no metadata of one.

    Reads two small files and no weights.

    Raises:
        FormatError: If there is metadata, and it is malformed.
        HubError: If the Hub, the repository or the revision cannot be reached.
    """
    return find_in(source.files)


def find_in(files: ModelFiles) -> FoundFilter | None:
    """`find_filter` on files that were opened already."""
    modules_file = files.path(MODULES_FILE)
    form: Form = "alone" if modules_file is None else "portable"
    folder = ""
    path = files.path(METADATA_FILE)
    if path is None and modules_file is not None:
        layers = [m for m in parse_modules(modules_file.read_bytes()) if m.kind == _LAYER]
        if layers:
            form, folder = "package", f"{layers[0].path}/"
            path = files.path(folder + METADATA_FILE)
    if path is None:
        return None
    try:
        metadata = FilterMetadata.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{METADATA_FILE} must be a text in UTF-8, got: {error}") from error
    return FoundFilter(form, metadata, folder, "2_Dense/" if form == "portable" else folder)

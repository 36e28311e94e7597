"""What a model card says, from the small files of a model folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from st_embfilter.errors import FormatError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.model.depth import Depth
from st_embfilter.model.metadata import METADATA_FILE, FilterMetadata
from st_embfilter.model.modules_file import MODULES_FILE, parse_modules
from st_embfilter.model.prompts import Recipe, recipe_from_dict
from st_embfilter.saved.card_rules import inherited, is_hub_id
from st_embfilter.saved.layout import POOLING_KEYS, TRANSFORMER_CONFIG
from st_embfilter.saved.results import Result
from st_embfilter.spectrum.whitening import Calibration
from st_embfilter.text import read_json

Form = Literal["portable", "plugin", "package"]


_PLAIN: Final = "sentence_transformers."


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says about one model.

    Attributes:
        base_model: Hub id or name of the language model; None if unknown.
        d: Width of the language model's hidden state.
        k: Width of the embeddings.
        band: Name of the band, e.g. "bulk" or "offset:128".
        start: First kept direction of a contiguous band, else None.
        keep: Width or ratio as it was asked for.
        on_hub: Whether `base_model` is a Hub id.
        revision: Commit of the base model.
        tensor: Name of the unembedding matrix.
        vocabulary: Number of rows of the unembedding matrix.
        dtype: The dtype as it is stored.
        tied: Whether it is also the input embedding.
        sha256: Hash of its bytes.
        prompt: Prompt recipe; None for plain text.
        calibration: How the filter was calibrated, as in the metadata; None for the filter alone.
        depth: How many of the base model's blocks it has; None for all.
        norm: "folded" if the norm's gain is in the spectrum.
        asked_dtype: Dtype that it must be asked for to be built again; None for the usual one.
        lens: A section in Markdown about nearest tokens and anisotropy, see `report.card_section`.
        pooling: Mode of `Pooling`.
        normalized: Whether embeddings have unit length.
        max_seq_length: Longest text in tokens.
        form: "portable" (no custom code), "plugin" (code of its own in the folder) or "package"
            (needs this package: what sentence-transformers saves by itself).
        inherited: Licence and languages of the base model.
        results: Scores, measured or reported.
    """

    base_model: str | None
    d: int
    k: int
    band: str
    start: int | None
    keep: float | int
    on_hub: bool = True
    revision: str | None = None
    tensor: str | None = None
    vocabulary: int | None = None
    dtype: str | None = None
    tied: bool = False
    sha256: str | None = None
    prompt: Recipe | None = None
    calibration: Calibration | None = None
    depth: Depth | None = None
    norm: str | None = None
    asked_dtype: str | None = None
    lens: str | None = None
    pooling: str = "mean"
    normalized: bool = False
    max_seq_length: int | None = None
    form: Form = "portable"
    inherited: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    @property
    def own(self) -> str:
        """What this model is called in results."""
        return self.band if self.calibration is None else "calibrated"

    @property
    def name(self) -> str:
        """Name of the model after its base, e.g. "Qwen2.5-0.5B-embfilter"."""
        base = (self.base_model or "model").rsplit("/", 1)[-1].removesuffix(".gguf")
        return f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', base)}-embfilter"  # stands in code and headings


def facts_of_files(
    files: Mapping[str, bytes],
    *,
    base_card: str | None = None,
    results: Iterable[Result] = (),
    dtype: str | None = None,
) -> CardFacts:
    """The facts about a model from the small files of its folder.

    Args:
        files: Contents by relative path; in the portable form or in sentence-transformers' own.
        base_card: The card to inherit from: the base model's, or an older one of this model.
        results: Scores to show.
        dtype: Of its backbone or its table, e.g. "float32"; None if it is not known.

    Raises:
        FormatError: If the folder holds no filter, or a file is malformed.
    """
    found = [path for path in files if path.rpartition("/")[2] == METADATA_FILE]
    if not found:
        raise FormatError(
            f"a filtered model must hold {METADATA_FILE}, got {len(files)} files without it; build "
            "one with `st-embfilter build`"
        )
    metadata = FilterMetadata.from_json(files[min(found, key=len)])
    source, band = metadata.provenance, metadata.band
    types = _modules(files)
    pooling = next((pair for pair in types.items() if pair[0].endswith("Pooling")), None)
    length = _content(files, TRANSFORMER_CONFIG, dict).get("max_seq_length")
    return CardFacts(
        base_model=source.model_id,
        d=metadata.d,
        k=metadata.k,
        band=str(band),
        start=band.start(metadata.d),
        keep=band.keep,
        on_hub=is_hub_id(source.model_id, source.revision),
        revision=source.revision,
        tensor=source.tensor,
        vocabulary=source.shape[0],
        dtype=source.dtype,
        tied=source.tied,
        sha256=source.sha256,
        prompt=None if metadata.prompt is None else recipe_from_dict(metadata.prompt),
        calibration=metadata.calibration,
        depth=metadata.depth,
        norm=metadata.norm,
        asked_dtype=None if dtype == _usual_dtype(metadata) else dtype,
        pooling="mean" if pooling is None else _pooling_mode(files, *pooling),
        normalized=any(kind.endswith("Normalize") for kind in types),
        max_seq_length=length if isinstance(length, int) else None,
        form=_form(types),
        inherited=inherited(base_card),
        results=tuple(results),
    )


def _usual_dtype(metadata: FilterMetadata) -> str | None:
    """What a build has unless asked otherwise: the checkpoint's dtype, and a table its own.

    That of a GGUF file hangs on its architecture, so it is always stated.
    """
    if metadata.depth is not None and metadata.depth.layers == 0:
        return "float16"
    source = metadata.provenance
    return source.dtype if source.gguf_sha256 is None else None


def _form(types: Iterable[str]) -> Form:
    custom = [kind for kind in types if not kind.startswith(_PLAIN)]
    if any(kind.startswith("st_embfilter.") for kind in custom):
        return "package"
    return "plugin" if custom else "portable"


def _pooling_mode(files: Mapping[str, bytes], kind: str, folder: str) -> str:
    if not kind.startswith(_PLAIN):
        return kind.rpartition(".")[2]
    config = _content(files, f"{folder}/config.json", dict)
    modes = [name for name, key in POOLING_KEYS.items() if config.get(key) is True]
    mode = config.get("pooling_mode")
    return "+".join(modes) or (mode if isinstance(mode, str) else "mean")


def small_files(files: ModelFiles) -> dict[str, bytes]:
    """The files that `facts_of_files` reads, where the folder's own modules have them."""

    def read(*names: str) -> dict[str, bytes]:
        found = {name: files.path(name) for name in names}
        return {name: path.read_bytes() for name, path in found.items() if path is not None}

    small = read(MODULES_FILE)
    paths = _modules(small).values()
    return small | read(
        TRANSFORMER_CONFIG,
        METADATA_FILE,
        *(f"{path}/{METADATA_FILE}" for path in paths if path),
        *(f"{path}/config.json" for path in paths if path),
    )


def _modules(files: Mapping[str, bytes]) -> dict[str, str]:
    """Folders of the modules by their types, in order."""
    found = parse_modules(files[MODULES_FILE]) if MODULES_FILE in files else []
    return {module.type: module.path for module in found}


def _content(files: Mapping[str, bytes], name: str, kind: type) -> Any:
    if name not in files:
        return kind()
    return read_json(files[name], name, FormatError, kind)

"""What a filter is made of: the content of `embfilter.json`.

A file format: keys and their meaning never change within a format version. Everything needed to
rebuild the filter bit for bit.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, get_args

import torch

from st_embfilter.errors import BandError, DepthError, FormatError, PromptError
from st_embfilter.model.depth import TOKEN_WEIGHTS, Depth
from st_embfilter.model.prompts import recipe_from_dict
from st_embfilter.spectrum.band import Band
from st_embfilter.spectrum.whitening import Calibration, Source
from st_embfilter.text import json_text, read_json
from st_embfilter.unembedding.matrix import Provenance

METADATA_FILE: Final = "embfilter.json"
SPECTRUM_FILE: Final = "embfilter_spectrum.safetensors"
#: The same of a filter that is baked into the weights beside it.
BAKED_FILE: Final = "embfilter_baked.json"
FORMAT_VERSION: Final = 1

_VERSIONED_PACKAGES: Final = ("st-embfilter", "sentence-transformers", "transformers", "torch")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a filter depends on, and of Python."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


@dataclass(frozen=True)
class FilterMetadata:
    """Everything about a filter but its matrix.

    Attributes:
        provenance: The unembedding matrix it was made from.
        band: Which directions it keeps; `band.keep` is the width as asked for.
        prompt: The prompt recipe of the model it was saved with, as a JSON object, or None; see
            `recipe_from_dict`.
        versions: Library versions at the time it was made.
        calibration: How it was calibrated; None for the filter alone.
        norm: "folded" if its directions are those of W_U diag(g), g the gain of the norm before it;
            the rows of its matrix are then divided by g.
        depth: How many of the language model's blocks it was saved with; None for all.
    """

    provenance: Provenance
    band: Band
    prompt: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=library_versions)
    calibration: Calibration | None = None
    norm: str | None = None
    depth: Depth | None = None

    @property
    def d(self) -> int:
        """Width of the embeddings that go in."""
        return self.provenance.shape[1]

    @property
    def k(self) -> int:
        """Width of the embeddings that come out."""
        return self.band.width(self.d)

    def to_json(self) -> str:
        """The text of `embfilter.json`."""
        source = self.provenance
        document = {
            "format_version": FORMAT_VERSION,
            "base_model": {
                "id": source.model_id,
                "revision": source.revision,
                **({} if source.gguf_sha256 is None else {"gguf_sha256": source.gguf_sha256}),
            },
            "unembedding": {
                "tensor": source.tensor,
                "shape": list(source.shape),
                "dtype": source.dtype,
                "tied": source.tied,
                "sha256": source.sha256,
            },
            "filter": {
                "band": self.band.family,
                "keep": self.band.keep,
                "d": self.d,
                "k": self.k,
                "start": self.band.start(self.d),
                "seed": self.band.seed,
                # The one family whose directions do not follow from d.
                **({} if self.band.order is None else {"order": list(self.band.order)}),
                **({} if self.norm is None else {"norm": self.norm}),
            },
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "prompt": None if self.prompt is None else dict(self.prompt),
            **({} if self.depth is None else {"depth": asdict(self.depth)}),
            "versions": dict(self.versions),
        }
        return json_text(document)

    @classmethod
    def from_json(cls, text: str | bytes) -> FilterMetadata:
        """Reads `embfilter.json`.

        Raises:
            FormatError: If it is no JSON, of a newer format version, or contradicts itself.
        """
        document = read_json(text, METADATA_FILE, FormatError)
        found = document.get("format_version")
        if type(found) is not int or not 1 <= found <= FORMAT_VERSION:
            raise FormatError(
                f"{METADATA_FILE} must have a format_version from 1 to {FORMAT_VERSION}, got "
                f"{found!r}; a newer one needs a newer st-embfilter"
            )
        base = _object(document.get("base_model"), "base_model")
        source = _object(document.get("unembedding"), "unembedding")
        window = _object(document.get("filter"), "filter")
        shape = _typed(source, "shape", list)
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape):
            raise FormatError(f"{METADATA_FILE}: shape must be two ints >= 1, got {shape!r}")
        provenance = Provenance(
            tensor=_typed(source, "tensor", str),
            shape=(shape[0], shape[1]),
            dtype=_typed(source, "dtype", str),
            tied=_typed(source, "tied", bool),
            sha256=_typed(source, "sha256", str),
            model_id=_typed(base, "id", str, None),
            revision=_typed(base, "revision", str, None),
            gguf_sha256=_typed(base, "gguf_sha256", str, None),
        )
        if not re.fullmatch(r"[0-9a-f]{64}", provenance.sha256):
            raise FormatError(
                f"{METADATA_FILE}: sha256 must be 64 hexadecimal digits, got "
                f"{provenance.sha256!r:.80}"
            )
        if not isinstance(getattr(torch, provenance.dtype, None), torch.dtype):
            raise FormatError(
                f"{METADATA_FILE}: dtype must be one of torch, got {provenance.dtype!r:.80}"
            )
        prompt = document.get("prompt")
        metadata = cls(
            provenance=provenance,
            band=_band(window),
            prompt=None if prompt is None else _prompt(_object(prompt, "prompt")),
            versions=_object(document.get("versions", {}), "versions"),
            calibration=_calibration(document.get("calibration")),
            norm=_norm(window),
            depth=_depth(document.get("depth")),
        )
        try:
            derived = {"d": metadata.d, "k": metadata.k, "start": metadata.band.start(metadata.d)}
        except BandError as error:
            raise FormatError(f"{METADATA_FILE}: {error}") from error
        for key, value in derived.items():
            if window.get(key) != value:
                raise FormatError(
                    f"{METADATA_FILE}: filter.{key} must be {value!r} for this band and shape, got "
                    f"{window.get(key)!r}; the file was edited or is damaged"
                )
        return metadata


def _band(window: dict[str, Any]) -> Band:
    family = _typed(window, "band", str)
    keep = _typed(window, "keep", int, float)
    seed = _check_seed(_typed(window, "seed", int, None))
    try:
        offset = _typed(window, "start", int) if family == "offset" else None
        order = _typed(window, "order", list, None)
        return Band(
            family, keep, offset=offset, seed=seed, order=None if order is None else tuple(order)
        )
    except BandError as error:
        raise FormatError(f"{METADATA_FILE}: {error}") from error


def _norm(window: dict[str, Any]) -> str | None:
    norm: str | None = _typed(window, "norm", str, None)
    if norm not in (None, "folded"):
        raise FormatError(f"{METADATA_FILE}: filter.norm must be 'folded' or absent, got {norm!r}")
    return norm


def _calibration(value: object) -> Calibration | None:
    if value is None:
        return None
    record = _object(value, "calibration")
    calibration = Calibration(
        source=_typed(record, "source", str),
        texts=_typed(record, "texts", int),
        sha256=_typed(record, "sha256", str),
        strength=_typed(record, "strength", float),
        shrinkage=_typed(record, "shrinkage", float),
        seed=_typed(record, "seed", int, None),
    )
    _check_seed(calibration.seed)
    in_range = 0.0 <= calibration.strength <= 1.0 and 0.0 <= calibration.shrinkage <= 1.0
    if calibration.source not in get_args(Source) or calibration.texts < 1 or not in_range:
        raise FormatError(
            f"{METADATA_FILE}: calibration must have a source among {', '.join(get_args(Source))}, "
            f"texts >= 1, and strength and shrinkage in [0, 1], got {record!r}"
        )
    return calibration


def _depth(value: object) -> Depth | None:
    if value is None:
        return None
    record = _object(value, "depth")
    layers, of = _typed(record, "layers", int), _typed(record, "of", int)
    weights = _typed(record, "token_weights", str, None)
    if weights is not None and (layers != 0 or weights not in TOKEN_WEIGHTS):
        raise FormatError(
            f"{METADATA_FILE}: token_weights must be null or, with 0 layers, one of "
            f"{', '.join(TOKEN_WEIGHTS)}, got {weights!r:.80} with {layers} layers"
        )
    try:
        return replace(Depth.parse(layers, of), token_weights=weights)
    except DepthError as error:
        raise FormatError(f"{METADATA_FILE}: depth: {error}") from error


def _prompt(data: dict[str, Any]) -> dict[str, Any]:
    try:
        return recipe_from_dict(data).to_dict()
    except PromptError as error:
        raise FormatError(f"{METADATA_FILE}: prompt: {error}") from error


def _check_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 2**63:
        raise FormatError(f"{METADATA_FILE}: seed must be in [0, 2^63), got {seed}")
    return seed


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{METADATA_FILE}: {what} must be an object, got {value!r}")
    return value


def _typed(source: dict[str, Any], key: str, *kinds: type | None) -> Any:
    value = source.get(key)
    if not any(value is None if kind is None else type(value) is kind for kind in kinds):
        names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise FormatError(f"{METADATA_FILE}: {key} must be {names}, got {value!r}")
    return value

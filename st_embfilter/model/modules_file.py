"""`modules.json` and the configuration of `Dense`: what a saved filtered model must say in them.

sentence-transformers reads them too, but trusts them more: an activation it does not know becomes
Tanh, and a malformed file ends in a traceback.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from st_embfilter.errors import FormatError, PlacementError
from st_embfilter.text import read_json

MODULES_FILE: Final = "modules.json"

#: The activation that makes `Dense` linear, by the one name that every stack understands.
IDENTITY: Final = "torch.nn.modules.linear.Identity"

_TRUSTED: Final = "sentence_transformers."


@dataclass(frozen=True)
class SavedModule:
    """One entry of `modules.json`.

    Attributes:
        type: Dotted path of its class.
        path: The module's folder, relative; "" for the model folder itself.
    """

    type: str
    path: str

    @property
    def kind(self) -> str:
        """Name of the class."""
        return self.type.rpartition(".")[2]


def parse_modules(data: bytes) -> list[SavedModule]:
    """The checked entries of `modules.json`, in order.

    Raises:
        FormatError: If it is no list of modules, or a path leads out of the folder.
    """
    entries = read_json(data, MODULES_FILE, FormatError, list)
    if not entries:
        raise FormatError(f"{MODULES_FILE} must list modules, got none")
    modules = []
    for entry in entries:
        kind = entry.get("type") if isinstance(entry, dict) else None
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or not isinstance(path, str):
            raise FormatError(
                f"{MODULES_FILE}: a module needs a type and a path, got {entry!r:.80}"
            )
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path:
            raise FormatError(
                f"{MODULES_FILE}: a module must lie inside the model folder, got path {path!r:.80}"
            )
        modules.append(SavedModule(kind, path))
    return modules


def filter_module(modules: list[SavedModule], *, trust_remote_code: bool) -> SavedModule:
    """The module that holds the filter, which must stand between pooling and normalisation.

    Args:
        modules: From `parse_modules`.
        trust_remote_code: Whether modules of other packages may be named.

    Raises:
        FormatError: If there is not exactly one, or a class is not trusted.
        PlacementError: If it stands after Normalize.
    """
    foreign = [module.type for module in modules if not module.type.startswith(_TRUSTED)]
    if foreign and not trust_remote_code:
        raise FormatError(
            f"{MODULES_FILE} names {foreign[0]!r:.80}, which is no class of sentence-transformers; "
            "read the code that it stands for, then pass trust_remote_code=True "
            "(--trust-remote-code)"
        )
    names = " > ".join(module.kind for module in modules)
    found = [i for i, m in enumerate(modules) if m.kind in ("Dense", "EmbedFilterLayer")]
    if len(found) != 1:
        raise FormatError(
            f"a filtered model must hold one Dense module, got {len(found)} in {names}; load it "
            "with SentenceTransformer"
        )
    if any(module.kind == "Normalize" for module in modules[: found[0]]):
        raise PlacementError(f"EmbedFilterLayer must stand before Normalize, got {names}")
    return modules[found[0]]


def check_dense_config(data: bytes, *, d: int, k: int, bias: bool) -> None:
    """Holds the configuration of `Dense` against the filter.

    Raises:
        FormatError: Names the key. A missing activation is read as Tanh by sentence-transformers.
    """
    config = read_json(data, "2_Dense/config.json", FormatError)
    expected = {
        "in_features": d,
        "out_features": k,
        "bias": bias,
        "activation_function": IDENTITY,
    }
    unknown = sorted(set(config) - set(expected))
    if unknown:
        raise FormatError(
            f"2_Dense/config.json must hold {', '.join(expected)} alone, got {unknown[0]!r:.80}; "
            "other keys change what sentence-transformers computes"
        )
    for key, value in expected.items():
        found = config.get(key)
        if type(found) is not type(value) or found != value:
            raise FormatError(
                f"2_Dense/config.json: {key} must be {value!r} for this filter, got {found!r:.80}"
            )

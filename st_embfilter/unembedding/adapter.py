"""PEFT adapters: which base model they belong to, and what they do to its head."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from st_embfilter.errors import HubError, UnembeddingError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.stored import StoredTensor
from st_embfilter.text import first_line, read_json

ADAPTER_CONFIG: Final = "adapter_config.json"
_SAFETENSORS: Final = "adapter_model.safetensors"
_TORCH: Final = "adapter_model.bin"
_PREFIX: Final = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Attributes:
        files: Where it lies.
        config: Content of the adapter's `adapter_config.json`.
    """

    files: ModelFiles
    config: Mapping[str, Any]

    @classmethod
    def open(cls, files: ModelFiles) -> Adapter | None:
        """The adapter among these files; None if there is none.

        Raises:
            UnembeddingError: If its config is damaged.
        """
        path = files.path(ADAPTER_CONFIG)
        if path is None:
            return None
        config = read_json(path.read_bytes(), str(path), UnembeddingError, infinity=True)
        if not isinstance(config.get("base_model_name_or_path"), str):
            raise UnembeddingError(
                f"{path} must name its base model in base_model_name_or_path, got {config!r:.80}"
            )
        if not isinstance(config.get("revision"), str | None):
            raise UnembeddingError(
                f"{path}: revision must be a name or null, got {config['revision']!r:.80}"
            )
        return cls(files, config)

    def trains(self, name: str) -> bool:
        """Whether the tensor `head` returned under this name is the adapter's work."""
        return name.startswith(_PREFIX)

    def head(self, names: list[str], stored: StoredTensor) -> StoredTensor:
        """The head of the adapted model.

        Args:
            names: Parameter names of the output embedding, its own first, then those it is tied to.
            stored: The head of the base model.

        Returns:
            The base model's where the adapter leaves it alone; otherwise the adapter's copy, or
            W + s B A in float32 for LoRA, with B (V, r) and A (r, d). Those carry the adapter's own
            tensor name.

        Raises:
            UnembeddingError: If the adapter changes the head in another way, or a tied embedding,
                where it hangs on the training whether the head follows.
        """
        own, *tied = (name.removesuffix(".weight") for name in names)
        weights = self._weights()
        touching = {key: tensor for key, tensor in weights.items() if _is_of(key, own)}
        for key in weights:
            if not touching and any(_is_of(key, module) for module in tied):
                raise _merge_first(f"{key!r}, an input embedding that the head is tied to")
        if not touching:
            return stored
        parts = {key.rsplit(".lora_", 1)[-1]: key for key in touching}
        full = next((key for key in touching if key.endswith(f"{own}.weight")), None)
        if full is not None:
            return StoredTensor.of(full, touching[full])
        if set(parts) == {"A.weight", "B.weight"}:
            return self._low_rank(stored, parts["A.weight"], weights, own)
        raise _merge_first(", ".join(sorted(touching)))

    def _low_rank(
        self, stored: StoredTensor, key: str, weights: Mapping[str, Tensor], module: str
    ) -> StoredTensor:
        a = weights[key].to(torch.float32)
        b = weights[key.replace("lora_A", "lora_B")].to(torch.float32)
        rank = a.shape[0] if a.ndim == 2 else 0
        if (
            rank < 1
            or b.ndim != 2
            or a.shape[1] != stored.shape[1]
            or b.shape != (stored.shape[0], rank)
        ):
            raise UnembeddingError(
                f"LoRA matrices of a head of shape {stored.shape} must fit it, got "
                f"{tuple(b.shape)} and {tuple(a.shape)}; the adapter belongs to another model"
            )
        alpha: Any = _by_module(
            self.config.get("alpha_pattern"), module, self.config.get("lora_alpha")
        )
        if type(alpha) not in (int, float) or not abs(alpha) < 1e9:
            raise UnembeddingError(
                f"{ADAPTER_CONFIG}: lora_alpha must be a number, got {alpha!r:.80}"
            )
        scale = float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

        def read_rows(first: int, last: int) -> Tensor:
            base = stored.read_rows(first, last).to(torch.float32)
            return base + scale * (b[first:last] @ a)

        return replace(stored, name=key, dtype=torch.float32, read_rows=read_rows)

    def _weights(self) -> dict[str, Tensor]:
        try:
            path = self.files.path(_SAFETENSORS)
            if path is not None:
                return load_file(path)
            path = self.files.path(_TORCH)
            if path is None:
                raise FileNotFoundError("no such file")
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except HubError:
            raise
        except (
            OSError,
            SafetensorError,
            RuntimeError,
            EOFError,
            ValueError,
            pickle.UnpicklingError,
        ) as error:
            raise UnembeddingError(
                f"an adapter folder must hold {_SAFETENSORS} or {_TORCH}, got none that can be "
                f"read in {self.files.where}: {first_line(error)}"
            ) from error
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
        ):
            raise UnembeddingError(f"{path.name} must hold tensors by name, got something else")
        return weights


def _is_of(key: str, module: str) -> bool:
    """Whether an adapter's tensor belongs to a module, whatever wrapped the model in training."""
    return f".{key.removeprefix(_PREFIX)}".startswith(f".{module}.") or f".{module}." in f".{key}"


def _by_module(pattern: object, module: str, default: Any) -> Any:
    """PEFT's per-module options: regular expressions that match the end of a name."""
    for expression, value in (pattern or {}).items() if isinstance(pattern, dict) else ():
        try:
            fits = re.fullmatch(rf"(.*\.)?({expression})", module)
        except (re.error, RecursionError) as error:
            raise UnembeddingError(
                f"{ADAPTER_CONFIG}: alpha_pattern must hold regular expressions, got "
                f"{expression!r:.80}"
            ) from error
        if fits:
            return value
    return default


def _merge_first(what: str) -> UnembeddingError:
    return UnembeddingError(
        "an adapter may leave the head alone, replace it, or add a plain LoRA to it, got one that "
        f"trains {what}; merge it into its base model with PEFT (merge_and_unload) and save that"
    )

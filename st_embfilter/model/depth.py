"""How much of a language model is used: its first blocks, then its final norm.

Which module holds the blocks comes from transformers itself: the one list of decoder layers in the
model. Checkpoints are cut in `cut`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from st_embfilter.errors import DepthError

LAYERS: Final = "num_hidden_layers"

#: How many of the last blocks reuse the keys and values of earlier ones.
_SHARED: Final = "num_kv_shared_layers"

#: Lists that may have as many entries as there are blocks by chance.
_NOT_BY_LAYER: Final = re.compile(r".*token_ids?|architectures|.*section")

#: Weight of a token by its rank r >= 0 in a vocabulary of V, from the most frequent on. The order
#: of a vocabulary is roughly that of frequency, so no data is needed. "zipf" is log(2 + r); "sif"
#: is a / (a + p) of Arora et al. 2017 with a = 1e-3 and p by Zipf's law.
TOKEN_WEIGHTS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "zipf": lambda rank: (rank + 2).log(),
    "sif": lambda rank: 1e-3 / (1e-3 + (rank + 2).reciprocal() / (rank + 2).reciprocal().sum()),
}


@dataclass(frozen=True)
class Depth:
    """How much of a language model is used.

    Attributes:
        layers: Number of blocks that are kept; 0 for the token embeddings alone.
        of: Number of blocks that the language model has.
        token_weights: With 0 layers, how tokens are weighted: None or a key of `TOKEN_WEIGHTS`.
    """

    layers: int
    of: int
    token_weights: str | None = None

    @classmethod
    def parse(cls, layers: float | int, of: int) -> Depth:
        """Depth from a number of blocks or a ratio of them, rounded, at least one block.

        Args:
            layers: Int in [0, of], or float in (0, 1].
            of: Number of blocks that the language model has.

        Raises:
            DepthError: If it is out of range.
        """
        if type(layers) is int and 0 <= layers <= of:
            return cls(layers, of)
        if type(layers) is float and 0.0 < layers <= 1.0:
            return cls(max(1, round(layers * of)), of)
        raise DepthError(
            f"layers must be an int in [0, {of}] or a ratio in (0, 1], got {layers!r}; this model "
            f"has {of} blocks"
        )


def block_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks of a transformers model, and the path of the list that holds them.

    Args:
        model: A causal LM or a backbone, on any device; of a composite model, its text decoder
            counts.

    Raises:
        DepthError: If there is not exactly one list of as many modules as the config has layers.
    """
    config: Any = model.config
    total = text_config(config).num_hidden_layers
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    inside = {id(module) for module in decoder.modules()}
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    found = [
        (name, module)
        for name, module in lists.items()
        if id(module) in inside
        and len(module) == total
        and any(True for _ in module.parameters())  # not rotary embeddings
        and not any(name.startswith(f"{outer}.") for outer in lists)
    ]
    # A tower for images or sounds is further inside than the decoder that it feeds.
    level = min((name.count(".") for name, _ in found), default=0)
    found = [(name, module) for name, module in found if name.count(".") == level]
    if len(found) != 1:
        raise DepthError(
            f"a model that is cut must hold its {total} blocks in one list of modules, got "
            f"{len(found)} such lists in {type(model).__name__}; use all of its layers"
        )
    return found[0]


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the text decoder.

    Raises:
        DepthError: If it names no number of layers.
    """
    text: PretrainedConfig = config.get_text_config(decoder=True)
    if type(getattr(text, LAYERS, None)) is not int:
        raise DepthError(
            f"a model that is cut must say its number of layers, got {config.model_type!r} "
            f"without {LAYERS}; use all of its layers"
        )
    return text


def config_changes(config: PretrainedConfig, layers: int) -> dict[str, Any]:
    """What a config says differently once the model is cut: the number of blocks, values by block.

    Args:
        config: Configuration of the text decoder.
        layers: Number of blocks that stay.
    """
    total: int = config.num_hidden_layers
    changes: dict[str, Any] = {LAYERS: layers}
    defaults = _default(type(config))
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and not _NOT_BY_LAYER.fullmatch(name):
            usual = defaults.get(name)
            if not isinstance(usual, list | tuple) or len(usual) == defaults.get(LAYERS):
                changes[name] = value[:layers]
        elif isinstance(value, dict) and "layer" in name and _by_number(value):
            changes[name] = {key: one for key, one in value.items() if int(key) < layers}
    shared = getattr(config, _SHARED, None)
    if shared:
        changes[_SHARED] = max(0, layers - (total - shared))
    return changes


def _by_number(value: dict[Any, Any]) -> bool:
    return bool(value) and all(str(key).isdecimal() for key in value)


def _default(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The config of an architecture as its class makes it; nothing if that needs arguments."""
    try:
        default = kind()
    except Exception:  # classes check themselves in many ways
        return {}
    return {**default.to_dict(), LAYERS: getattr(default, LAYERS, None)}


def cut_config(
    document: Mapping[str, Any], config: PretrainedConfig, layers: int
) -> dict[str, Any]:
    """The content of `config.json` for the cut model; all other keys stay as they are.

    Args:
        document: The content of `config.json`.
        config: The document, parsed by transformers.
        layers: Number of blocks that stay, >= 1.
    """
    text = text_config(config)
    cut = deepcopy(dict(document))
    nested = [key for key in config.sub_configs if getattr(config, key, None) is text]
    node = cut.setdefault(nested[0], {}) if nested else cut
    for name, value in config_changes(text, layers).items():
        alias = text.attribute_map.get(name, name)
        stored = [key for key in (name, alias) if key in node]
        # A list that the class derives from the number of layers need not be written.
        if stored or name in (LAYERS, _SHARED):
            node.update(dict.fromkeys(stored or [alias], value))
    return dict(cut)


def cut_model(model: nn.Module, layers: float | int, *, at_least: int = 0) -> Depth:
    """Cuts a live transformers model in place.

    Args:
        model: A causal LM or a backbone.
        layers: Number or ratio of blocks that stay, see `Depth.parse`. With 0 the config keeps
            one, which no model runs.
        at_least: The least number that is allowed.

    Raises:
        DepthError: If its blocks cannot be found, or are fewer.
    """
    _, stack = block_stack(model)
    depth = Depth.parse(layers, len(stack))
    if depth.layers < at_least:
        raise DepthError(
            f"a model that is cut in place must keep a block, got layers={layers!r}; use "
            "from_causal_lm"
        )
    config = text_config(model.config)  # type: ignore[arg-type]
    changes = config_changes(config, max(1, depth.layers))
    del stack[depth.layers :]
    for name, value in changes.items():
        setattr(config, name, value)
    return depth


@contextmanager
def cut_to(model: nn.Module, layers: float | int) -> Iterator[None]:
    """Lets a live model run as if it were cut, while the context lasts.

    Args:
        model: A causal LM or a backbone.
        layers: Number or ratio of blocks that run, see `Depth.parse`.

    Raises:
        DepthError: If its blocks cannot be found, or are fewer.
    """
    path, stack = block_stack(model)
    config = text_config(model.config)  # type: ignore[arg-type]
    kept = Depth.parse(layers, len(stack)).layers
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    changes = config_changes(config, max(1, kept))
    before = {key: getattr(config, key) for key in changes}
    setattr(owner, name, stack[:kept])
    try:
        for key, value in changes.items():
            setattr(config, key, value)
        yield
    finally:
        setattr(owner, name, stack)
        for key, value in before.items():
            setattr(config, key, value)


def final_norm(model: nn.Module) -> nn.Module:
    """The module that makes a backbone's output from its last block's, feature by feature.

    Found by what it does in a run on one token: the last to run, and its output is the model's.

    Raises:
        DepthError: If the model ends in something else.
    """
    latest: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            latest[:] = [(module, output)]

    leaves = [module for module in model.modules() if not any(module.children())]
    hooks = [leaf.register_forward_hook(remember) for leaf in leaves]
    try:
        with torch.no_grad():
            ids = torch.tensor([[0]], device=next(model.parameters()).device)
            made = model(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    module, output = latest[0]
    if any(p.ndim > 1 for p in module.parameters()) or output.data_ptr() != made.data_ptr():
        raise DepthError(
            "reading between blocks needs a backbone that ends in a norm, got one that ends in "
            f"{type(module).__name__}; read all of its layers"
        )
    return module

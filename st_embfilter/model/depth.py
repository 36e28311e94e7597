"""A language model cut to its first blocks, then its final norm.

Which module holds the blocks, and which tensors belong to them, comes from transformers itself: the
one list of decoder layers in the model, built from its config on the meta device. A cut checkpoint
is an ordinary smaller model of the same architecture.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import PretrainedConfig

from st_embfilter.errors import DepthError, EmbedFilterError
from st_embfilter.files.hub import explained
from st_embfilter.files.tensors import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    Checkpoint,
    LocalSafetensors,
    ModelFiles,
    TorchCheckpoint,
    open_checkpoint,
)
from st_embfilter.files.writer import RawTensor, raw_tensors, write_safetensors
from st_embfilter.model.backbone import check_links, small_files
from st_embfilter.text import read_json
from st_embfilter.unembedding.adapter import ADAPTER_CONFIG
from st_embfilter.unembedding.head import meta_model, stored_names
from st_embfilter.unembedding.source import CONFIG_FILE, Source

LAYERS: Final = "num_hidden_layers"

#: How many of the last blocks reuse the keys and values of earlier ones.
_SHARED: Final = "num_kv_shared_layers"

#: Lists that may have as many entries as there are blocks by chance.
_NOT_BY_LAYER: Final = re.compile(r".*token_ids?|architectures|.*section")


@dataclass(frozen=True)
class Depth:
    """How much of a language model is used.

    Attributes:
        layers: Number of blocks that are kept; 0 for the token embeddings alone.
        of: Number of blocks that the language model has.
        token_weights: With 0 layers, how tokens are weighted, see `static`.
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
        and not any(name.startswith(f"{outer}.") for outer in lists)
    ]
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
    """What a config says differently once the model is cut: the number of blocks, lists by block.

    Args:
        config: Of the text decoder.
        layers: Number of blocks that stay.
    """
    total: int = config.num_hidden_layers
    changes: dict[str, Any] = {LAYERS: layers}
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == total and not _NOT_BY_LAYER.fullmatch(name):
            changes[name] = value[:layers]
    shared = getattr(config, _SHARED, None)
    if shared:
        changes[_SHARED] = max(0, layers - (total - shared))
    return changes


def cut_config(
    document: Mapping[str, Any], config: PretrainedConfig, layers: int
) -> dict[str, Any]:
    """The content of `config.json` for the cut model; all other keys stay as they are.

    Args:
        document: The content of `config.json`.
        config: The same, parsed by transformers.
        layers: Number of blocks that stay, >= 1.
    """
    text = text_config(config)
    cut = json.loads(json.dumps(document))
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


def blocks_to_keep(model: nn.Module, source: Source) -> int | None:
    """How many blocks a live model has, if its checkpoint has more; else None."""
    try:
        stored = text_config(source.config()).num_hidden_layers
        live = len(block_stack(model)[1])
    except EmbedFilterError:
        return None
    return live if live < stored else None


def block_numbers(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """The blocks of those checkpoint tensors that belong to one, counted from 0.

    Args:
        model: The whole model, e.g. on the meta device.
        names: Tensor names as the checkpoint has them.

    Raises:
        DepthError: If some block has no tensor.
    """
    path, stack = block_stack(model)
    base = f"{getattr(model, 'base_model_prefix', '')}."
    pattern = re.compile(rf"({re.escape(path)}|{re.escape(path.removeprefix(base))})\.(\d+)\..*")
    keys = frozenset(names)

    def numbers(named: Iterable[tuple[str, str]]) -> dict[str, int]:
        matches = ((key, pattern.fullmatch(name)) for name, key in named)
        return {key: int(match[2]) for key, match in matches if match}

    found = numbers((key, key) for key in keys)
    if not found:  # transformers renames when it loads
        found = numbers(stored_names(model, keys).items())
    missing = set(range(len(stack))) - set(found.values())
    if missing:
        raise DepthError(
            f"a checkpoint that is cut must hold every block of {path}, got no tensor of block "
            f"{min(missing)}; use all of its layers"
        )
    return found


def cut_checkpoint(source: Source, target: Path, layers: int) -> None:
    """Writes the first blocks of a checkpoint, and all that is in no block, as a smaller one.

    Tensors are copied byte by byte, a piece at a time, shard by shard; only the files that hold
    needed tensors are read, and on the Hub downloaded.

    Args:
        source: A language model.
        target: An empty folder.
        layers: Number of blocks that stay, >= 1.

    Raises:
        DepthError: If the model cannot be cut.
        UnembeddingError: If config or weights are missing or damaged.
    """
    config = source.config()
    document = read_json(
        _local(source.files, CONFIG_FILE).read_bytes(), CONFIG_FILE, DepthError, infinity=True
    )
    checkpoint = open_checkpoint(source.files)
    options = {"masked_lm": source.masked_lm, "trust_remote_code": source.trust_remote_code}
    whole = meta_model(config, **options)
    dropped = {n for n, i in block_numbers(whole, checkpoint.names).items() if i >= layers}
    for file in _small(source):
        shutil.copyfile(file, target / file.name)
    document = cut_config(document, config, layers)
    (target / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    kept = Source(str(target), trust_remote_code=source.trust_remote_code).config()
    _check_cut(whole, meta_model(kept, **options), layers)
    places: dict[str, str] = {}
    for shard, tensors in _shards(source.files, checkpoint, checkpoint.names - dropped):
        write_safetensors(target / shard, tensors)
        places |= dict.fromkeys(tensors, shard)
    if set(places.values()) != {SAFETENSORS_FILE}:
        size = sum((target / shard).stat().st_size for shard in set(places.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (target / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(
    files: ModelFiles, checkpoint: Checkpoint, names: frozenset[str]
) -> Iterator[tuple[str, dict[str, RawTensor]]]:
    """File name and tensors of every shard that holds a needed tensor."""
    for shard in dict.fromkeys(checkpoint.place(name) for name in sorted(names)):
        if isinstance(checkpoint, TorchCheckpoint):
            state = checkpoint.load(shard)
            found = {key: RawTensor.of(state[key]) for key in state if key in names}
            yield shard.replace("pytorch_model", "model").replace(".bin", ".safetensors"), found
        else:
            stored = raw_tensors(LocalSafetensors(_local(files, shard)))
            yield shard, {key: stored[key] for key in stored if key in names}


def _local(files: ModelFiles, file: str) -> Path:
    path = files.path(file)
    if path is None:
        raise DepthError(f"a model that is cut must hold {file}, got none in {files.where}")
    return path


def _small(source: Source) -> list[Path]:
    """Every file but the weights that a backbone and its card need."""
    if source.is_folder:
        folder = Path(source.name)
        check_links(folder)
        return small_files(folder)
    try:
        options = source.for_transformers()
        del options["trust_remote_code"]
        ignored = ["*.safetensors", "*.bin", "*.gguf", "*.pth", "*.onnx", "*/*"]
        return small_files(Path(snapshot_download(source.name, **options, ignore_patterns=ignored)))
    except (OSError, ValueError) as error:
        raise explained(error, source.name, source.revision) from error


def _check_cut(whole: nn.Module, cut: nn.Module, layers: int) -> None:
    """The cut config must describe the same model but for the blocks that are gone."""
    path, _ = block_stack(whole)
    block = re.compile(rf"{re.escape(path)}\.(\d+)\..*")

    def stays(name: str) -> bool:
        match = block.fullmatch(name)
        return match is None or int(match[1]) < layers

    expected = {n: v.shape for n, v in whole.state_dict().items() if stays(n)}
    found = {name: value.shape for name, value in cut.state_dict().items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))
        raise DepthError(
            f"a model that is cut must keep the shape of its first blocks, got another "
            f"{different[0][0]!r} in {type(whole).__name__}; use all of its layers"
        )


def load_cut(
    source: Source, layers: float | int, load: Callable[[Source], Transformer]
) -> tuple[Transformer, Depth]:
    """Loads the first blocks of a language model as the first module of a `SentenceTransformer`.

    The cut checkpoint is written into a temporary folder that lives as long as the module, and
    loaded as any other. An adapter must be merged first: its model is loaded whole and cut live.

    Args:
        source: A language model, or an adapter of one.
        layers: Number of blocks or ratio of them, see `Depth.parse`.
        load: Loads a whole model.

    Raises:
        DepthError: If the model cannot be cut, or not there.
    """
    if source.files.path(ADAPTER_CONFIG) is not None:
        backbone = load(source)
        return backbone, cut_model(backbone.auto_model, layers)
    depth = Depth.parse(layers, text_config(source.config()).num_hidden_layers)
    if depth.layers == depth.of:
        return load(source), depth
    folder = tempfile.mkdtemp(prefix="st-embfilter-")
    try:
        cut_checkpoint(source, Path(folder), max(1, depth.layers))
        backbone = load(Source(folder, trust_remote_code=source.trust_remote_code))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(backbone, shutil.rmtree, folder, ignore_errors=True)
    if depth.layers == 0:
        cut_model(backbone.auto_model, 0)
    return backbone, depth

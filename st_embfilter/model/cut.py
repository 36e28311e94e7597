"""A checkpoint cut to its first blocks: an ordinary smaller model of the same architecture.

Which tensors belong to which block comes from transformers itself: from the model of the config on
the meta device.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn

from st_embfilter.errors import BackboneError, DepthError, EmbedFilterError, UnembeddingError
from st_embfilter.files.folder import ModelFiles
from st_embfilter.files.hub_errors import explained
from st_embfilter.files.stored import LocalSafetensors
from st_embfilter.files.tensors import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    Checkpoint,
    TorchCheckpoint,
    open_checkpoint,
)
from st_embfilter.files.writer import RawTensor, raw_tensors, write_safetensors
from st_embfilter.model.backbone import check_links, small_files
from st_embfilter.model.depth import Depth, block_stack, cut_config, cut_model, text_config
from st_embfilter.text import read_json, write_json
from st_embfilter.unembedding.adapter import ADAPTER_CONFIG
from st_embfilter.unembedding.head import meta_model, stored_names
from st_embfilter.unembedding.source import CONFIG_FILE, Source


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
    write_json(target / CONFIG_FILE, document)
    try:
        kept = Source(str(target), trust_remote_code=source.trust_remote_code).config()
        smaller = meta_model(kept, **options)
    except UnembeddingError as error:
        raise _no_such_model(layers, error) from error
    _check_cut(whole, smaller, layers)
    places: dict[str, str] = {}
    for shard, tensors in _shards(source.files, checkpoint, checkpoint.names - dropped):
        write_safetensors(target / shard, tensors)
        places |= dict.fromkeys(tensors, shard)
    if set(places.values()) != {SAFETENSORS_FILE}:
        size = sum((target / shard).stat().st_size for shard in set(places.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(target / SAFETENSORS_INDEX, index)


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
    for before, after in zip(block_stack(whole)[1][:layers], block_stack(cut)[1], strict=True):
        for (name, one), (_, other) in zip(
            before.named_modules(), after.named_modules(), strict=True
        ):
            for key, value in vars(one).items():
                if isinstance(value, int | float | str) and value != vars(other).get(key):
                    raise DepthError(
                        "a model that is cut must compute its first blocks as before, got another "
                        f"{f'{name}.{key}'.lstrip('.')} in {type(before).__name__}, "
                        f"{vars(other).get(key)} instead of {value}; use all of its layers"
                    )


def _no_such_model(layers: int, error: EmbedFilterError) -> DepthError:
    """What transformers has against the smaller model, without the folder that it lay in."""
    lines = str(error.__cause__ or error).splitlines() or [type(error.__cause__).__name__]
    cause = lines[-1].strip(" .")
    return DepthError(
        f"transformers must know the model with {layers} of its blocks, got: {cause}; keep more of "
        "its layers"
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
        try:
            backbone = load(Source(folder, trust_remote_code=source.trust_remote_code))
        except BackboneError as error:
            raise _no_such_model(max(1, depth.layers), error) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(backbone, shutil.rmtree, folder, ignore_errors=True)
    if depth.layers == 0:
        cut_model(backbone.auto_model, 0)
    return backbone, depth

"""A GGUF file with a filter baked in, for llama.cpp and everything that is built on it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import torch
from torch import Tensor

from st_embfilter.errors import FormatError, OutputError, UnembeddingError
from st_embfilter.files.staging import written_file
from st_embfilter.model.baked import folded_spectrum, reading_rows, rotation_of, writing_rows
from st_embfilter.spectrum.band import Band
from st_embfilter.unembedding.gguf import FINAL_NORM, INPUT, OUTPUT, GGUFFile, GGUFTensor, library
from st_embfilter.unembedding.residual import Residual

Kind = Literal["f32", "f16", "q8_0"]

#: Our keys in the metadata.
DIMENSIONS_KEY: Final = "st_embfilter.dimensions"
BAND_KEY: Final = "st_embfilter.band"
PROMPT_KEY: Final = "st_embfilter.prompt"

#: Poolings that llama.cpp has, by our name, with their number in the format.
POOLING_TYPES: Final = {"mean": 1, "cls": 2, "lasttoken": 3}

#: `general.file_type` of each kind.
_FILE_TYPES: Final = {"f32": 0, "f16": 1, "q8_0": 7}

_FILE_TYPE_KEY: Final = "general.file_type"

#: What the format's names say: the norm before each matrix that reads the stream, the matrices
#: that add to it, and the tensors that do neither.
_READS: Final = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": ("ffn_gate", "ffn_up"),
}
_WRITES: Final = ("attn_output", "ffn_down")
_INSIDE: Final = re.compile(
    r"blk\.\d+\.(attn_[qk]_norm\.weight|(attn_(q|k|v|qkv)|ffn_(gate|up))\.bias)"
    r"|rope_freqs\.weight|(blk\.\d+\.)?rope_factors_(long|short)\.weight"
)

_BLOCK: Final = re.compile(r"blk\.(\d+)\.")

_STRING, _UINT32 = 8, 4


@dataclass(frozen=True)
class _Plan:
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int
    content: Iterable[bytes]


def export_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    keep: float | int | None = None,
    band: str | Band = "bulk",
    pooling: str = "mean",
    prompt: str | None = None,
    kind: Kind = "f16",
    float32_blocks: int = 0,
    overwrite: bool = False,
    like: Tensor | None = None,
) -> tuple[int, int]:
    """Writes a GGUF file whose pooled embedding is the filter, at every width.

    The file holds the same language model: its metadata and tokenizer are copied byte for byte, its
    logits stay. Tensors go through memory one at a time and in blocks.

    Args:
        source: The GGUF file of a pre-norm RMSNorm model, in any quantisation.
        target: File to write; appears complete or not at all.
        keep: Width that is recorded for the user, as in `Band`; the embedding has all d numbers.
        band: Which directions come first.
        pooling: "mean", "lasttoken" or "cls"; recorded, so that llama.cpp pools that way.
        prompt: Template of a prompt with `{text}`, recorded for the user; llama.cpp applies none.
        kind: How matrices are stored.
        float32_blocks: Of so many first blocks, matrices are stored as float32 all the same. Where
            large activations form there, half a bit decides what the last token becomes.
        overwrite: Replace a file that is there.
        like: (k, d), a folded filter's projection, whose directions the first k must be.

    Returns:
        The recorded width k, and d.

    Raises:
        UnembeddingError: If the model's stream cannot be rotated, with the reason.
        FormatError: If the pooling, the type or the number of blocks is none that there is.
        OutputError: If the target exists, or cannot be written.
    """
    source, target = Path(source), Path(target)
    if pooling not in POOLING_TYPES:
        raise FormatError(
            f"llama.cpp pools by {', '.join(POOLING_TYPES)}, got {pooling!r}; build the model with "
            "one of them"
        )
    if kind not in _FILE_TYPES:
        raise FormatError(f"the type must be one of {', '.join(_FILE_TYPES)}, got {kind!r}")
    if float32_blocks < 0:
        raise FormatError(f"float32_blocks must be 0 or more, got {float32_blocks}")
    chosen = Band.parse(band, keep)
    with written_file(target, overwrite=overwrite) as out:
        if target.exists() and target.samefile(source):
            raise OutputError(f"the output must not be the input, got {target} for both")
        file = GGUFFile.open(source)
        residual = gguf_residual(file)
        head = file.tensors.get(OUTPUT, file.tensors[INPUT])
        gain = file.rows(file.tensors[FINAL_NORM]).to(torch.float64)
        shape = (head.shape[0], head.shape[1])
        if like is not None and like.shape[1] != shape[1]:
            raise FormatError(
                f"the GGUF file must be of the model that the filter was made from, "
                f"{like.shape[1]} wide, got one {shape[1]} wide; give the file of that model"
            )
        width = chosen.width(shape[1])
        spectrum = folded_spectrum(partial(file.rows, head), shape, gain)
        rotation = rotation_of(spectrum, chosen)
        if like is not None:
            _check_like(like * gain, rotation[:width])
        arch = file.metadata["general.architecture"]
        keys: dict[str, int | str] = {
            _FILE_TYPE_KEY: _FILE_TYPES[kind],
            f"{arch}.pooling_type": POOLING_TYPES[pooling],
            DIMENSIONS_KEY: width,
            BAND_KEY: str(chosen),
            **({} if prompt is None else {PROMPT_KEY: prompt}),
        }
        # Float32 files get products in float64, so that their rounding is the only one.
        rotation = rotation if kind == "f32" else rotation.to(torch.float32)
        _write(out, file, keys, _plans(file, residual, rotation, kind, float32_blocks))
    return width, shape[1]


def advice(file: Path) -> str | None:
    """What a written file asks of llama.cpp, whose defaults would cost more than its weights.

    Keys of large biases lose the rest of their digits in a cache of 16 bits, and the last token may
    hang on them. No weights undo that: scores are invariant only under what scales or turns pairs
    of a key's numbers, which leaves relative errors as they are.
    """
    found = GGUFFile.open(file)
    pooling = found.metadata.get(f"{found.metadata['general.architecture']}.pooling_type")
    biases = any(name.endswith("attn_k.bias") for name in found.tensors)
    if pooling != POOLING_TYPES["lasttoken"] or not biases:
        return None
    return (
        "The keys of this model have biases and its last token is pooled: llama.cpp is exact with "
        "--cache-type-k f32 --cache-type-v f32 --flash-attn off, and loses more with its cache of "
        "16 bits than these weights do"
    )


def gguf_residual(file: GGUFFile) -> Residual:
    """How the tensors of a GGUF file meet the residual stream, from the names of the format.

    Raises:
        UnembeddingError: If its stream cannot be rotated: another norm than RMSNorm, norms behind
            the blocks, parallel blocks, experts, or tensors of unknown use.
    """
    names = set(file.tensors)
    arch = file.metadata.get("general.architecture")
    if DIMENSIONS_KEY in file.metadata:
        raise _refusal("a file with a filter in it; give the file that it was made from")
    if f"{arch}.attention.layer_norm_rms_epsilon" not in file.metadata or any(
        name.endswith("norm.bias") for name in names
    ):
        raise _refusal(
            f"a norm of {arch!r} that subtracts the mean or adds a bias (LayerNorm), which does "
            "not commute with a rotation"
        )
    for name in sorted(names):
        if re.search(r"post_\w*norm|_norm_2|_sub_norm", name):
            raise _refusal(
                f"the norm {name!r} behind a block (a post-norm), whose gain acts on what is added "
                "to the stream and does not commute with a rotation"
            )
        if "_exps" in name or "ffn_gate_inp" in name:
            raise _refusal(f"a mixture of experts, with {name!r}")
    count = int(file.metadata[f"{arch}.block_count"])
    reads: dict[str, str] = {OUTPUT: FINAL_NORM}
    writes: set[str] = set()
    for block in (f"blk.{n}." for n in range(count)):
        for norm, matrices in _READS.items():
            readers = [f"{block}{matrix}.weight" for matrix in matrices]
            present = [name for name in readers if name in names]
            if present and f"{block}{norm}.weight" not in names:
                raise _refusal(
                    f"a model without {block}{norm}.weight: attention and feed-forward read one "
                    "norm (parallel blocks), or the norm has no gain"
                )
            reads.update(dict.fromkeys(present, f"{block}{norm}.weight"))
        written = (f"{block}{matrix}.{part}" for matrix in _WRITES for part in ("weight", "bias"))
        writes.update(name for name in written if name in names)
    known = {INPUT, OUTPUT, FINAL_NORM, *reads, *reads.values(), *writes}
    unknown = sorted(name for name in names - known if not _INSIDE.fullmatch(name))
    missing = {INPUT, FINAL_NORM} - names
    if unknown or missing:
        raise _refusal(
            f"a file {'without ' + min(missing) if missing else 'with ' + repr(unknown[0])}, of "
            f"architecture {arch!r}"
        )
    return Residual(INPUT, OUTPUT, reads, frozenset(writes))


def _plans(
    file: GGUFFile, residual: Residual, rotation: Tensor, kind: Kind, float32_blocks: int
) -> Iterator[_Plan]:
    for name, tensor in file.tensors.items():
        block = _BLOCK.match(name)
        early = block is not None and int(block[1]) < float32_blocks
        yield _plan(file, name, tensor, residual, rotation, "f32" if early else kind)
    if OUTPUT not in file.tensors:
        yield _plan(file, OUTPUT, file.tensors[INPUT], residual, rotation, kind)


def _plan(
    file: GGUFFile, name: str, tensor: GGUFTensor, residual: Residual, rotation: Tensor, kind: Kind
) -> _Plan:
    kinds = library().GGMLQuantizationType
    read = partial(file.rows, tensor)
    one_row = len(tensor.shape) == 1
    rows: Iterable[Tensor]
    if name in residual.gains:
        rows = iter([torch.ones(tensor.shape)])
    elif name in residual.writes and one_row:
        rows = (rotation @ vector.to(rotation.dtype) for vector in [read()])
    elif name in residual.writes:
        rows = writing_rows(read, (tensor.shape[0], tensor.shape[1]), rotation)
    elif name in residual.reads or name == residual.embedding:
        shape = (tensor.shape[0], tensor.shape[1])
        norm = residual.reads.get(name)
        gain = None if norm is None else file.rows(file.tensors[norm])
        rows = reading_rows(read, shape, rotation, gain)
    else:
        return _Plan(name, tensor.shape, tensor.kind, tensor.nbytes, _bytes_of(file, tensor))
    if one_row:
        stored = kinds.F32
    elif kind == "q8_0" and tensor.shape[-1] % 32:  # whole blocks only
        stored = kinds.F16
    else:
        stored = kinds[kind.upper()]
    values, size = library().GGML_QUANT_SIZES[stored]
    nbytes = prod(tensor.shape) // values * size
    return _Plan(name, tensor.shape, int(stored), nbytes, _quantized(rows, stored))


def _quantized(rows: Iterable[Tensor], kind: Any) -> Iterator[bytes]:
    for block in rows:
        values: np.ndarray[Any, Any] = library().quantize(block.to(torch.float32).numpy(), kind)
        yield values.tobytes()


def _bytes_of(file: GGUFFile, tensor: GGUFTensor) -> Iterator[bytes]:
    with file.path.open("rb") as data:
        data.seek(tensor.start)
        yield data.read(tensor.nbytes)


def _write(
    out: BinaryIO, file: GGUFFile, keys: dict[str, int | str], plans: Iterable[_Plan]
) -> None:
    """Header, metadata, tensor table and tensors; everything that is not in `keys` as it was."""
    plans = list(plans)
    kept = [span for key, span in file.spans.items() if key not in keys]
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(plans), len(kept) + len(keys)))
    with file.path.open("rb") as data:
        for start, stop in kept:
            data.seek(start)
            out.write(data.read(stop - start))
    for key, value in keys.items():
        out.write(_string(key))
        if isinstance(value, str):
            out.write(struct.pack("<I", _STRING) + _string(value))
        else:
            out.write(struct.pack("<II", _UINT32, value))
    alignment = int(file.metadata.get("general.alignment", 32))
    offset = 0
    for plan in plans:
        sizes = plan.shape[::-1]
        out.write(_string(plan.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        out.write(struct.pack("<IQ", plan.kind, offset))
        offset += plan.nbytes + -plan.nbytes % alignment
    out.write(bytes(-out.tell() % alignment))
    for plan in plans:
        for block in plan.content:
            out.write(block)
        out.write(bytes(-out.tell() % alignment))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _check_like(like: Tensor, rows: Tensor) -> None:
    """Checks that k directions are nearly those given: quantised heads differ a little."""
    directions = torch.linalg.qr(like.to(torch.float64).T)[0]
    overlap = float((rows[: like.shape[0]] @ directions).square().sum()) / like.shape[0]
    if overlap < 0.9:
        raise UnembeddingError(
            "the GGUF file must be of the model that the filter was made from, got one whose "
            f"directions share {overlap:.0%} with the filter's; give the file of that model"
        )


def _refusal(what: str) -> UnembeddingError:
    return UnembeddingError(
        "only the stream of a sequential pre-norm model with RMSNorm can be rotated (Llama, "
        f"Mistral, Qwen2, Qwen3 and others of that form), got {what}; use the filter as a layer"
    )

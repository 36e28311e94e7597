"""Filter vectors that are already there: the filter is linear, so no text is encoded again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from st_embfilter.errors import CalibrationError, CorpusError, MissingPackageError, ShapeError
from st_embfilter.files.staging import written_file
from st_embfilter.model.layer import EmbedFilterLayer
from st_embfilter.spectrum.band import Band
from st_embfilter.text import reading

#: An array of numpy, also a memory-mapped one, or a tensor.
Vectors = TypeVar("Vectors", NDArray[Any], torch.Tensor)

#: Bytes of float32 vectors that are filtered at a time.
_BLOCK: Final = 16 << 20

#: How far from one the lengths of vectors may be that were scaled to unit length: bfloat16 has
#: 8 bits, so 2^-9. Pooled states of language models are longer by orders of magnitude.
_UNIT: Final = 2e-3

_SUFFIXES: Final = (".npy", ".parquet")


def filter_vectors(
    vectors: Vectors,
    filter: EmbedFilterLayer | str | os.PathLike[str],  # noqa: A002
    *,
    dims: float | int | None = None,
    normalize: bool = False,
    out: Vectors | None = None,
) -> Vectors:
    """Stored embeddings of the unfiltered model, filtered.

    They must come from the model that the filter was made from, with the same prompt, pooling and
    depth; only their width can be checked. An uncalibrated filter is linear: for vectors that were
    scaled to unit length, x / |x|, the result is that of x, divided by |x|. Its cosines are
    exactly the filtered model's; its lengths and inner products are not, unless `normalize`.

    Args:
        vectors: (n, d) or (d,), of any floating dtype; an array of numpy, also a memory-mapped one,
            which is read in blocks, or a tensor.
        filter: A filter, or the folder or Hub id of a saved one or of a filtered model.
        dims: Width of the result: a prefix of the filter's, as a ratio of it or as a number; None
            for all.
        normalize: Whether the results are scaled to unit length, as `Normalize` does.
        out: (n, k), where the result is written, e.g. memory-mapped; None for new memory.

    Returns:
        (n, k) or (k,) float32, of the kind and on the device of `vectors`; `out` if it was given.

    Raises:
        ShapeError: If the width is not the filter's, or `out` has another shape.
        CalibrationError: If the filter is calibrated and all vectors have unit length: it subtracts
            a mean, which needs the lengths that they had.
        CorpusError: If a vector is not finite, or too long for float32.
    """
    layer = _layer(filter)
    width = layer.out_features if dims is None else Band(keep=dims).width(layer.out_features)
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != layer.in_features:
        raise ShapeError(
            f"this filter takes vectors of width {layer.in_features}, (n, {layer.in_features}), "
            f"got shape {tuple(vectors.shape)}; give it unfiltered embeddings of "
            f"{layer.metadata.provenance.model_id or 'its language model'}"
        )
    shape = (*vectors.shape[:-1], width)
    if out is not None and tuple(out.shape) != shape:
        raise ShapeError(f"out must have the shape of the result, {shape}, got {tuple(out.shape)}")
    result: Any
    if isinstance(vectors, torch.Tensor):
        result = torch.empty(shape, device=vectors.device) if out is None else out
    else:
        result = np.empty(shape, np.float32) if out is None else out
    source, target = (vectors[None], result[None]) if vectors.ndim == 1 else (vectors, result)
    rows = _rows(layer)
    for start in range(0, len(source), rows):
        block = source[start : start + rows]
        tensor = block if isinstance(block, torch.Tensor) else _tensor(block)
        part = _apply(tensor, layer, width, normalize)
        if not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part).all(dim=1)).sum())
            raise CorpusError(
                f"vectors must be finite, in float32 as well, got NaN or infinity in {bad} of a "
                f"block of {len(part)}; leave them out, or encode their texts again"
            )
        target[start : start + rows] = part if isinstance(target, torch.Tensor) else part.numpy()
    filtered_vectors: Vectors = result
    return filtered_vectors


def apply_filter(
    filter: EmbedFilterLayer | str | os.PathLike[str],  # noqa: A002
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    column: str = "embedding",
    dims: float | int | None = None,
    normalize: bool = False,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Filters the vectors of a file into another one, block by block; see `filter_vectors`.

    Args:
        filter: A filter, or the folder or Hub id of a saved one or of a filtered model.
        source: `.npy`, (n, d), or `.parquet` with a column of lists of d numbers.
        target: File of the same kind to write; appears complete or not at all. Other columns of
            Parquet are copied.
        column: Name of the column of vectors, in Parquet.
        dims: Width of the result, see `filter_vectors`.
        normalize: Whether rows get length 1, see `filter_vectors`.
        overwrite: Replace a file that is there.

    Returns:
        Number of vectors and their new width.

    Raises:
        CorpusError: If the file cannot be read, or holds no vectors.
        ShapeError: If their width is not the filter's.
        CalibrationError: If the filter is calibrated and the vectors are normalised.
        OutputError: If the target exists, or cannot be written.
    """
    source, target = Path(source), Path(target)
    kind = source.suffix.lower()
    if kind not in _SUFFIXES or target.suffix.lower() != kind:
        raise CorpusError(
            f"vectors are read from and written to one kind of file, {' or '.join(_SUFFIXES)}, got "
            f"{source.name} and {target.name}"
        )
    layer = _layer(filter)
    width = layer.out_features if dims is None else Band(keep=dims).width(layer.out_features)
    with written_file(target, overwrite=overwrite) as file:
        if kind == ".npy":
            with reading(source.name, CorpusError, "be an array of numpy"):
                stored = np.load(source, mmap_mode="r", allow_pickle=False)
            if stored.ndim != 2 or stored.dtype.kind != "f":
                raise CorpusError(
                    f"{source.name} must hold vectors, (n, {layer.in_features}) of floating "
                    f"numbers, got shape {stored.shape} and {stored.dtype}"
                )
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (len(stored), width)}
            )
            rows = _rows(layer)
            for start in range(0, max(len(stored), 1), rows):
                block = stored[start : start + rows]
                file.write(filter_vectors(block, layer, dims=width, normalize=normalize).data)
            return len(stored), width
        count = 0
        writer: Any = None
        for batch, vectors in _batches(source, column, layer.in_features, _rows(layer)):
            found = filter_vectors(vectors, layer, dims=width, normalize=normalize)
            table = _replaced(batch, column, found)
            if writer is None:
                import pyarrow.parquet as pq

                writer = pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
            count += len(found)
        writer.close()
        return count, width


def _layer(given: EmbedFilterLayer | str | os.PathLike[str]) -> EmbedFilterLayer:
    if isinstance(given, EmbedFilterLayer):
        return given
    return EmbedFilterLayer.from_pretrained(given)


def _rows(layer: EmbedFilterLayer) -> int:
    return max(1, _BLOCK // (4 * layer.in_features))


def _tensor(block: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(block, np.float32))  # torch takes no read-only memory


def _apply(
    block: torch.Tensor, layer: EmbedFilterLayer, width: int, normalize: bool
) -> torch.Tensor:
    """(n, d) to (n, width) float32, on the device of the block."""
    block = block.detach().to(torch.float32)
    if layer.bias and len(block) and bool(((block.norm(dim=1) - 1).abs() <= _UNIT).all()):
        raise CalibrationError(
            "a calibrated filter takes vectors of the length that pooling gave them, got vectors "
            "of unit length, from which its mean cannot be subtracted; encode the texts without "
            "normalisation, or use a filter that is not calibrated"
        )
    weight = layer.projection[:width].to(block.device)
    bias = None if layer.linear.bias is None else layer.linear.bias[:width].to(block.device)
    with torch.no_grad():
        filtered = torch.nn.functional.linear(block, weight, bias)
        return torch.nn.functional.normalize(filtered, dim=1) if normalize else filtered


def _batches(
    source: Path, column: str, width: int, rows: int
) -> Iterator[tuple[Any, NDArray[Any]]]:
    """Batches of a Parquet file with the vectors of its column; at least one, maybe empty."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(
            "Parquet files need pyarrow: pip install 'st-embfilter[corpus]'"
        ) from error
    with reading(source.name, CorpusError, "be a Parquet file"):
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
    kind = schema.field(column).type if schema.names.count(column) == 1 else None
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if kind is None or not any(is_kind(kind) for is_kind in lists):
        raise CorpusError(
            f"{source.name} must have a column {column!r} of lists of numbers, got "
            + ", ".join(f"{field.name} ({field.type})" for field in schema)[:200]
        )
    with file:
        number = 0
        for batch in _or_empty(file.iter_batches(batch_size=rows), schema):
            found = batch.column(column)
            sizes = found.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(sizes != width)
            if len(wrong):
                raise ShapeError(
                    f"this filter takes vectors of width {width}, got {int(sizes[wrong[0]])} "
                    f"numbers in row {number + int(wrong[0])} of {source.name}"
                )
            numbers = found.flatten()
            if numbers.null_count:
                raise CorpusError(
                    f"{source.name} must hold numbers in column {column!r}, got a null behind row "
                    f"{number}"
                )
            with reading(f"{source.name}, column {column}", CorpusError, "hold numbers"):
                values = numbers.to_numpy(zero_copy_only=False).astype(np.float32)
            number += len(found)
            yield batch, values.reshape(len(found), width)


def _or_empty(batches: Iterator[Any], schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    found = False
    for batch in batches:
        found = True
        yield batch
    if not found:
        yield pa.RecordBatch.from_pylist([], schema)


def _replaced(batch: Any, column: str, vectors: NDArray[Any]) -> Any:
    """The batch as a table with other vectors in its column."""
    import pyarrow as pa

    flat = pa.array(vectors.reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    table = pa.Table.from_batches([batch])
    # Hugging Face's own schema beside Arrow's would name the old width.
    described = {k: v for k, v in (table.schema.metadata or {}).items() if k != b"huggingface"}
    table = table.replace_schema_metadata(described)
    return table.set_column(table.schema.get_field_index(column), column, lists)

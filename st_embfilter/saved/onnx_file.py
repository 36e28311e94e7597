"""An ONNX file, written tensor by tensor, and read without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from st_embfilter.files.staging import written_file

#: A protobuf message may have 2 GiB; what describes the graph needs some of it.
LARGEST_FILE: Final = 2_000_000_000

#: Weights of more bytes than this are looked up in their file.
_SMALL: Final = 1024

#: Fields of onnx.proto: the graph of a model, a weight of a graph, the bytes of a weight.
_GRAPH, _WEIGHT, _BYTES = 7, 5, 9

#: The wire type of a field of bytes; the others in these messages are numbers.
_LENGTH: Final = 2


def write(model: Any, path: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Writes the graph; its weights go beside it where one file cannot hold them.

    Args:
        model: An `onnx_ir.Model`.
        path: Of the graph.
        metadata: Texts that the file carries.

    Returns:
        The files.
    """
    import onnx_ir as ir

    model.metadata_props.update(metadata)
    weights = model.graph.initializers
    if sum(value.const_value.nbytes for value in weights.values()) > LARGEST_FILE:
        beside = f"{path.name}_data"  # as transformers.js looks for it
        ir.save(model, path, external_data=beside)
        return [path, path.with_name(beside)]
    kept = dict(weights)
    weights.clear()
    proto = ir.to_proto(model)
    weights.update(kept)
    with written_file(path) as file:
        _stream(proto, kept, file)
    return [path]


def _stream(proto: Any, weights: Mapping[str, Any], file: BinaryIO) -> None:
    """Writes a `ModelProto` with weights that are never all in memory.

    The order of fields is free. Source: onnx.proto and the encoding of protobuf.
    """
    import onnx

    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads: dict[str, bytes] = {}
    for name, value in weights.items():
        tensor = value.const_value
        start = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=list(tensor.shape))
        content = start.SerializeToString() + _tag(_BYTES, tensor.nbytes)
        heads[name] = _tag(_WEIGHT, len(content) + tensor.nbytes) + content
    size = len(graph) + sum(len(head) + weights[n].const_value.nbytes for n, head in heads.items())
    file.write(proto.SerializeToString() + _tag(_GRAPH, size) + graph)
    for name, head in heads.items():
        file.write(head)
        tensor = weights[name].const_value
        numbers = np.ascontiguousarray(tensor.numpy())
        file.write(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).data)


def _tag(field: int, size: int) -> bytes:
    """The key of a field of bytes, and their number."""
    return bytes(_varint(field << 3 | _LENGTH)) + bytes(_varint(size))


def _varint(number: int) -> Iterable[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number


def without_weights(path: Path) -> bytes:
    """The graph of a written file as a model in memory whose weights are "external data" in it.

    A runtime maps them then. From the file itself it makes a message, and of that its tensors,
    which takes the memory of the weights twice.

    Args:
        path: Of the graph; a runtime wants to be told its folder.
    """
    parts = []
    with path.open("rb") as file:
        for number, start, content, end in _fields(file, 0, path.stat().st_size):
            if number == _GRAPH:
                inside = _fields(file, content, end)
                graph = b"".join(_outside(file, path.name, *field) for field in inside)
                parts.append(_tag(_GRAPH, len(graph)) + graph)
            else:
                parts.append(_span(file, start, end))
    return b"".join(parts)


def _outside(file: BinaryIO, name: str, number: int, start: int, content: int, end: int) -> bytes:
    """A field of a graph; a weight says where its bytes are."""
    import onnx

    if number != _WEIGHT:
        return _span(file, start, end)
    weight = b""
    for part, first, inner, last in _fields(file, content, end):
        if part == _BYTES and last - inner > _SMALL:
            outside = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
            for key, value in {"location": name, "offset": inner, "length": last - inner}.items():
                outside.external_data.add(key=key, value=str(value))
            weight += outside.SerializeToString()
        else:
            weight += _span(file, first, last)
    return _tag(_WEIGHT, len(weight)) + weight


def _fields(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """The number of each field of a message, where it and its content start, and its end."""
    while start < stop:
        file.seek(start)
        number, kind = divmod(_read_varint(file), 8)
        size = _read_varint(file)  # or the content itself
        content = file.tell()
        end = content + size if kind == _LENGTH else content
        yield number, start, content, end
        start = end


def _read_varint(file: BinaryIO) -> int:
    number = shift = 0
    while True:
        (byte,) = file.read(1)
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number


def _span(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)

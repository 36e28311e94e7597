"""A whole model as one ONNX graph: traced, its weights narrowed, written tensor by tensor."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn

from st_embfilter.errors import FormatError, MissingPackageError
from st_embfilter.files.staging import written_file
from st_embfilter.model.layer import FEATURE
from st_embfilter.text import reading

Dtype = Literal["float32", "float16", "int8"]

INPUTS: Final = ("input_ids", "attention_mask")

#: A protobuf message may have 2 GiB; what describes the graph needs some of it.
LARGEST_FILE: Final = 2_000_000_000

#: The newest opset of ONNX that onnxruntime-web, fastembed and transformers.js were tried with.
OPSET: Final = 20

_FLOAT, _FLOAT16, _INT8 = 1, 10, 3


def libraries() -> None:
    """Checks that the packages of the extra `onnx` are there.

    Raises:
        MissingPackageError: Names the one that is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"an ONNX graph needs {error.name}: pip install 'st-embfilter[onnx]'"
        ) from error


class Pipeline(nn.Module):
    """The modules of a model as one function of two tensors, in float32 on the CPU.

    Args:
        model: Its weights are shared where they are in float32 on the CPU, else copied.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        first, *rest = model.children()
        head = _Table(first) if isinstance(first, StaticEmbedding) else first
        self.stages = nn.ModuleList(_narrow(module) for module in (head, *rest))
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) int64, twice, to (batch, k) float32."""
        features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        for stage in self.stages:
            features = stage(features)
        return features[FEATURE].float()  # type: ignore[no-any-return]

    def width(self) -> int:
        """Width k of the embeddings."""
        ids = torch.zeros(1, 8, dtype=torch.long)
        with torch.inference_mode():
            return int(self(ids, torch.ones_like(ids)).shape[1])


class _Table(nn.Module):
    """A `StaticEmbedding` over padded rows of ids, instead of a bag and its offsets."""

    def __init__(self, static: StaticEmbedding) -> None:
        super().__init__()
        self.register_buffer("weight", static.embedding.weight.detach())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the rows that are no padding, zeros if there are none."""
        mask = features["attention_mask"][..., None].to(torch.float32)
        rows = nn.functional.embedding(features["input_ids"], self.get_buffer("weight"))
        return features | {FEATURE: (rows * mask).sum(1) / mask.sum(1).clamp(min=1)}


def _narrow(module: nn.Module) -> nn.Module:
    """The module in float32 on the CPU; itself, where it is."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(t.device.type == "cpu" and t.dtype in _EXACT for t in tensors):
        return module
    return copy.deepcopy(module).to("cpu", torch.float32)


_EXACT: Final = (torch.float32, torch.int64, torch.int32, torch.bool)


def trace(pipeline: Pipeline, opset: int) -> Any:
    """The graph, as an `onnx_ir.Model`, for any number of texts and tokens.

    Raises:
        FormatError: If the exporter of torch cannot follow the model.
    """
    ids = torch.zeros(2, 8, dtype=torch.long)
    axes = {0: "batch", 1: "tokens"}
    with (
        quiet(),
        reading("the model", FormatError, "be one that torch can trace to ONNX"),
    ):
        program = torch.onnx.export(
            pipeline,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[FEATURE],
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise FormatError("torch.onnx.export must give a program, got None")
    return program.model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of exporters and quantisers, which are about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def narrow_tables(model: Any, dtype: Dtype) -> None:
    """Stores the tables that tokens are looked up in with 16 bits, or 8 and a scale for each row.

    Only the rows of a text are ever widened.
    """
    for value in list(model.graph.initializers.values()):
        uses = list(value.uses())
        tensor = value.const_value
        if tensor.dtype != _FLOAT or len(tensor.shape) != 2:
            continue
        if not uses or any(node.op_type != "Gather" or i != 0 for node, i in uses):
            continue
        name = value.name
        if dtype == "float16":
            narrow = _initializer(model, f"{name}_16", tensor, _FLOAT16, _as_float16)
            for node, _ in uses:
                _after(model, node, narrow, None)
        else:
            narrow = _initializer(model, f"{name}_8", tensor, _INT8, _as_int8)
            scale = _initializer(model, f"{name}_scale", tensor, _FLOAT, _row_scale)
            for node, _ in uses:
                _after(model, node, narrow, scale)
        del model.graph.initializers[name]


def _after(model: Any, gather: Any, table: Any, scale: Any) -> None:
    """Looks up in `table` what `gather` does, and widens it."""
    import onnx_ir as ir

    old = gather.outputs[0]
    ids = gather.inputs[1]
    found = ir.node("Gather", [table, ids], attributes={"axis": 0})
    wide = ir.node("Cast", [found.outputs[0]], attributes={"to": _FLOAT})
    nodes = [found, wide]
    if scale is not None:
        factor = ir.node("Gather", [scale, ids], attributes={"axis": 0})
        nodes += [factor, ir.node("Mul", [wide.outputs[0], factor.outputs[0]])]
    ir.convenience.replace_nodes_and_values(
        model.graph, gather, [gather], nodes, [old], [nodes[-1].outputs[0]]
    )


def narrow_matrices(model: Any) -> None:
    """Stores all other matrices with 16 bits; they are widened when the graph is loaded."""
    import onnx_ir as ir

    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        uses = list(value.uses())
        if tensor.dtype != _FLOAT or len(tensor.shape) != 2 or not uses:
            continue
        narrow = _initializer(model, f"{value.name}_16", tensor, _FLOAT16, _as_float16)
        wide = ir.node("Cast", [narrow], attributes={"to": _FLOAT})
        model.graph.insert_before(uses[0][0], wide)
        ir.convenience.replace_all_uses_with(value, wide.outputs[0])
        del model.graph.initializers[value.name]
    model.graph.sort()


def _initializer(
    model: Any, name: str, tensor: Any, dtype: int, convert: Callable[[NDArray[Any]], NDArray[Any]]
) -> Any:
    """A new weight of the graph that is computed from another when it is written."""
    import onnx_ir as ir

    rows, width = tensor.shape
    shape = ir.Shape([rows, 1 if convert is _row_scale else width])
    kind = ir.DataType(dtype)
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(convert(tensor.numpy())), dtype=kind, shape=shape, name=name
    )
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=lazy)
    model.graph.initializers[name] = value
    return value


def _as_float16(table: NDArray[Any]) -> NDArray[Any]:
    return table.astype(np.float16)


def _row_scale(table: NDArray[Any]) -> NDArray[Any]:
    """(rows, 1): the largest entry of a row is 127."""
    scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.asarray(scale, np.float32)


def _as_int8(table: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.rint(table / _row_scale(table)), np.int8)


def quantized(graph: Any, place: Path) -> Any:
    """The graph with all matrices in 8 bits, by the dynamic quantisation of onnxruntime.

    A scale for each column. Weights are unsigned: with signed ones, processors without VNNI
    saturate.

    Args:
        graph: In float32.
        place: A folder for what comes between, which must outlive the result.
    """
    import onnx_ir as ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    wide, narrow = place / "wide.onnx", place / "narrow.onnx"
    ir.save(graph, wide, external_data=f"{wide.name}_data")
    with quiet():
        quantize_dynamic(
            wide,
            narrow,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=True,
        )
    return ir.load(narrow)


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

    The graph is field 7 of a model, a weight field 5 of a graph, its bytes field 9 of a weight; the
    order of fields is free. Source: onnx.proto and the encoding of protobuf.
    """
    import onnx

    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads: dict[str, bytes] = {}
    for name, value in weights.items():
        tensor = value.const_value
        start = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=list(tensor.shape))
        content = start.SerializeToString() + _tag(9, tensor.nbytes)
        heads[name] = _tag(5, len(content) + tensor.nbytes) + content
    size = len(graph) + sum(len(head) + weights[n].const_value.nbytes for n, head in heads.items())
    file.write(proto.SerializeToString() + _tag(7, size) + graph)
    for name, head in heads.items():
        file.write(head)
        tensor = weights[name].const_value
        numbers = np.ascontiguousarray(tensor.numpy())
        file.write(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).data)


def _tag(field: int, size: int) -> bytes:
    """The key of a field of bytes, and their number."""
    return bytes(_varint(field << 3 | 2)) + bytes(_varint(size))


def _varint(number: int) -> Iterable[int]:
    while number > 127:
        yield number & 127 | 128
        number >>= 7
    yield number

"""A whole model as one ONNX graph: traced, and its weights narrowed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor, nn

from st_embfilter.errors import FormatError, MissingPackageError
from st_embfilter.model.layer import FEATURE
from st_embfilter.text import reading

Dtype = Literal["float32", "float16", "int8"]

INPUTS: Final = ("input_ids", "attention_mask")

#: The newest opset of ONNX that onnxruntime-web, fastembed and transformers.js were tried with.
OPSET: Final = 20

#: How many numbers of a column share a scale in 8 bits.
BLOCK: Final = 32

_FLOAT, _UINT8, _INT8, _FLOAT16 = 1, 2, 3, 10

#: Domain of the operators that onnxruntime adds to those of ONNX.
_CONTRIBUTED: Final = "com.microsoft"

#: What is multiplied may be rounded to 8 bits too, with a scale for each block.
_IN_8_BITS: Final = 4


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


def narrow(model: Any, dtype: Literal["float16", "int8"]) -> None:
    """Stores all matrices with 16 bits, or with 8 and scales.

    Tables that tokens are looked up in stay narrow, with a scale for each row: only the rows of a
    text are ever widened. Other matrices of 16 bits are widened when the graph is loaded; those of
    8 are multiplied as they are, with a scale for every `BLOCK` numbers of a column.
    """
    for value in list(model.graph.initializers.values()):
        tensor, uses = value.const_value, list(value.uses())
        if tensor.dtype != _FLOAT or len(tensor.shape) != 2 or not uses:
            continue
        if all(node.op_type == "Gather" and i == 0 for node, i in uses):
            _narrow_table(model, value, dtype)
        elif dtype == "float16":
            _widen_first(model, value)
        elif not _multiply_in_blocks(model, value):
            continue
        del model.graph.initializers[value.name]
    model.graph.sort()


def _narrow_table(model: Any, table: Any, dtype: Dtype) -> None:
    """Looks tokens up in a narrow table, and widens what was found."""
    import onnx_ir as ir

    name, tensor = table.name, table.const_value
    if dtype == "float16":
        narrow = _initializer(model, f"{name}_16", tensor, _FLOAT16, tensor.shape, _as_float16)
        scale = None
    else:
        rows = (tensor.shape[0], 1)
        narrow = _initializer(model, f"{name}_8", tensor, _INT8, tensor.shape, _as_int8)
        scale = _initializer(model, f"{name}_scale", tensor, _FLOAT, rows, _row_scale)
    for gather, _ in list(table.uses()):
        ids = gather.inputs[1]
        found = ir.node("Gather", [narrow, ids], attributes={"axis": 0})
        wide = ir.node("Cast", [found.outputs[0]], attributes={"to": _FLOAT})
        nodes = [found, wide]
        if scale is not None:
            factor = ir.node("Gather", [scale, ids], attributes={"axis": 0})
            nodes += [factor, ir.node("Mul", [wide.outputs[0], factor.outputs[0]])]
        _replace(model, gather, nodes)


def _widen_first(model: Any, matrix: Any) -> None:
    """Stores a matrix with 16 bits and widens it when the graph is loaded."""
    import onnx_ir as ir

    tensor = matrix.const_value
    narrow = _initializer(model, f"{matrix.name}_16", tensor, _FLOAT16, tensor.shape, _as_float16)
    wide = ir.node("Cast", [narrow], attributes={"to": _FLOAT})
    model.graph.insert_before(matrix.uses()[0][0], wide)
    ir.convenience.replace_all_uses_with(matrix, wide.outputs[0])


def _multiply_in_blocks(model: Any, matrix: Any) -> bool:
    """Multiplies by a matrix of 8 bits: `MatMulNBits`, an operator of onnxruntime.

    Returns:
        Whether it could; the graph is as it was if the matrix is used otherwise.
    """
    import onnx_ir as ir

    found = {_turned(node, i) for node, i in matrix.uses()}
    if len(found) != 1 or None in found:
        return False
    turned = found == {True}
    name, tensor = matrix.name, matrix.const_value
    outputs, inputs = tensor.shape if turned else reversed(tensor.shape)
    shape = (outputs, -(-inputs // BLOCK), BLOCK)
    codes = _initializer(
        model, f"{name}_8", tensor, _UINT8, shape, lambda w: _codes(_blocks(w, turned))
    )
    scales = _initializer(
        model, f"{name}_scale", tensor, _FLOAT, shape[:2], lambda w: _steps(_blocks(w, turned))
    )
    sizes = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK}
    for node, _ in list(matrix.uses()):
        bias = [None, None, node.inputs[2]] if len(node.inputs) > 2 else []
        product = ir.node(
            "MatMulNBits",
            [node.inputs[0], codes, scales, *bias],
            domain=_CONTRIBUTED,
            attributes={**sizes, "accuracy_level": _IN_8_BITS},
        )
        _replace(model, node, [product])
    model.graph.opset_imports[_CONTRIBUTED] = 1
    return True


def _turned(node: Any, place: int) -> bool | None:
    """Whether a node multiplies by the transpose of its input; None if it does something else."""
    if place != 1 or node.op_type not in ("MatMul", "Gemm"):
        return None
    numbers = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    if any(given.get(name, usual) != usual for name, usual in numbers.items()):
        return None
    return bool(given.get("transB", 0))


def _replace(model: Any, old: Any, nodes: list[Any]) -> None:
    """Puts nodes, of which the last gives the result, in the place of one."""
    import onnx_ir as ir

    ir.convenience.replace_nodes_and_values(
        model.graph, old, [old], nodes, [old.outputs[0]], [nodes[-1].outputs[0]]
    )


def _initializer(
    model: Any,
    name: str,
    tensor: Any,
    dtype: int,
    shape: Sequence[int],
    convert: Callable[[NDArray[Any]], NDArray[Any]],
) -> Any:
    """A new weight of the graph that is computed from another when it is written."""
    import onnx_ir as ir

    kind, dims = ir.DataType(dtype), ir.Shape(shape)
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(convert(tensor.numpy())), dtype=kind, shape=dims, name=name
    )
    value = ir.Value(name=name, shape=dims, type=ir.TensorType(kind), const_value=lazy)
    model.graph.initializers[name] = value
    return value


def _as_float16(table: NDArray[Any]) -> NDArray[Any]:
    return table.astype(np.float16)


def _row_scale(table: NDArray[Any]) -> NDArray[Any]:
    """(..., n) to (..., 1): the largest entry of a row is 127."""
    scale = np.abs(table).max(axis=-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.asarray(scale, np.float32)


def _as_int8(table: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.rint(table / _row_scale(table)), np.int8)


def _blocks(matrix: NDArray[Any], turned: bool) -> NDArray[Any]:
    """(inputs, outputs), or turned, to (outputs, blocks, BLOCK), zeros behind the last input."""
    rows = matrix if turned else matrix.T
    short = -rows.shape[1] % BLOCK
    return np.pad(rows, ((0, 0), (0, short))).reshape(len(rows), -1, BLOCK)


def _codes(blocks: NDArray[Any]) -> NDArray[Any]:
    """Unsigned, 128 for zero, as `MatMulNBits` reads them."""
    return np.asarray(np.rint(blocks / _row_scale(blocks)) + 128, np.uint8)


def _steps(blocks: NDArray[Any]) -> NDArray[Any]:
    """(outputs, blocks)."""
    return _row_scale(blocks)[..., 0]

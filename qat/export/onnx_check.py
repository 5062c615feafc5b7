"""What an ONNX model of a file may ask for, checked before a runtime sees it.

Runtimes read other files that a model names, load operations of other packages, and take whatever
memory a shape asks for. No file of ours needs any of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from qat.errors import ExportError
from qat.memory import available

_DOMAINS = ("", "ai.onnx")
_EXTERNAL = TensorProto.EXTERNAL
_NESTED = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_SCALED = ("QuantizeLinear", "DequantizeLinear")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def check_model(model: ModelProto) -> None:
    """Refuse a model that is more than a graph of ONNX's own operations on tensors of its own.

    Args:
        model: A model, read from bytes.

    Raises:
        ExportError: Says what it asks for.
    """
    if not model.graph.input or not model.graph.output:
        raise ExportError("a graph without inputs or outputs")
    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise ExportError("functions, training or sparse tensors")
    for node in model.graph.node:
        _check_node(node)
    for tensor in _tensors(model):
        _check_tensor(tensor)
    _check_scales(model)
    _check_memory(model)


def take_in_data(model: ModelProto, folder: Path) -> bool:
    """Read the tensors that lie in files beside a model's own, in place; return whether any does.

    Args:
        model: A model, read from bytes.
        folder: Where its file lies. Nothing outside of it is read, and no link is followed.

    Raises:
        ExportError: If a tensor is said to lie elsewhere, or is not there.
    """
    outside = [t for t in _tensors(model) if t.external_data or t.data_location == _EXTERNAL]
    for tensor in outside:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        name, size = facts.get("location", ""), _bytes_of(tensor)
        file = folder / name
        is_beside = Path(name).name == name and file.is_file() and not file.is_symlink()
        if not is_beside or file.stat().st_size < int(facts.get("offset", 0)) + size:
            raise ExportError(f"a tensor '{tensor.name}' of {size} bytes in another file, '{name}'")
    if outside:
        load_external_data_for_model(model, str(folder))
    return bool(outside)


def _check_node(node: NodeProto) -> None:
    if node.domain not in _DOMAINS:
        raise ExportError(f"an operation {node.op_type} of the package {node.domain!r}")
    if any(attribute.type in _NESTED for attribute in node.attribute):
        raise ExportError(f"an operation {node.op_type} with a graph inside")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors


def _check_tensor(tensor: TensorProto) -> None:
    if any(size < 0 for size in tensor.dims):
        raise ExportError(f"a tensor '{tensor.name}' of shape {tuple(tensor.dims)}")
    if tensor.HasField("raw_data") and len(tensor.raw_data) != _bytes_of(tensor):
        raise ExportError(f"{len(tensor.raw_data)} bytes of a tensor '{tensor.name}'")


def _bytes_of(tensor: TensorProto) -> int:
    """Return the bytes that a tensor of this type and shape takes in a file."""
    count = math.prod(tensor.dims)
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return -(-count // 2)
    try:
        return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise ExportError(f"a tensor '{tensor.name}' of type {tensor.data_type}") from None


def _check_scales(model: ModelProto) -> None:
    """Refuse NaN in any weight, and scales that are negative or infinite."""
    scales = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in _SCALED and len(node.input) > 1
    }
    for tensor in model.graph.initializer:
        if tensor.data_type not in _FLOATS:
            continue
        values = numpy_helper.to_array(tensor)
        is_wrong = bool(np.isnan(values).any())
        if tensor.name in scales:
            is_wrong = is_wrong or not bool((np.isfinite(values) & (values >= 0)).all())
        if is_wrong:
            raise ExportError(f"NaN, or a scale that is negative or infinite, in '{tensor.name}'")


def _check_memory(model: ModelProto) -> None:
    """Refuse shapes that would not fit in memory, as far as they can be inferred."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # of a damaged graph, the C++ library raises types of its own
        raise ExportError(f"shapes that do not fit ({str(error).splitlines()[0]:.200})") from error
    wanted = 0
    for value in [*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input]:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        wanted += 4 * math.prod(size for size in sizes if size > 0)  # a batch of one
    if wanted > available():
        raise ExportError(f"tensors of {wanted / 2**30:,.1f} GiB, more than is free")

"""What the file stores of weights: 8-bit integers, or 4-bit ones where 4 bits are enough.

``speed`` stores codes of up to 8 bits in 8, from which runtimes form integer kernels. ``size``
stores those of up to 4 bits as ONNX INT4 and UINT4: half the bytes and the same real values, but
runtimes dequantize them and compute the layer in float.

onnxruntime turns the product with a 4-bit matrix into one operator, MatMulNBits, which by default
rounds what it multiplies with to 8 bits, on scales that no training has seen; with the session's
``qdq_matmulnbits_accuracy_level`` at 1 it does not. Group-wise weights, which have no other
kernel, are laid out for it; all others so that it does not form.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from onnxscript import ir
from torch import nn

from qat.errors import ConfigError
from qat.integer_layers import IntegerLayer

Storage = Literal["speed", "size"]
BITS = 4


def check_storage(name: object) -> Storage:
    """Return ``name`` if it is the name of a storage.

    Raises:
        ConfigError: If it is not.
    """
    for known in get_args(Storage):
        if name == known:
            return known
    raise ConfigError(
        f"expected export.storage to be one of {', '.join(get_args(Storage))}, got {name!r}: "
        "choose speed for integer kernels, size for 4-bit weights in 4 bits."
    )


def store_in_four_bits(graph: ir.Graph, model: nn.Module) -> None:
    """Store the weights of at most 4 bits as INT4 and UINT4, in place; no real value changes.

    Args:
        graph: The graph of ``model``, whose initialisers have the names of its buffers.
        model: What ``qat.graph.convert`` returned.
    """
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, IntegerLayer) and layer.spec.bits <= BITS:
            parts = [f"{name}.weight_{part}" for part in ("codes", "scale", "zero_point")]
            if all(part in graph.initializers for part in parts):  # else under another name
                _store(graph, layer, *(graph.initializers[part] for part in parts))


def _store(
    graph: ir.Graph, layer: IntegerLayer, codes: ir.Value, scale: ir.Value, zero_point: ir.Value
) -> None:
    spec = layer.spec
    kind = ir.DataType.INT4 if spec.signed else ir.DataType.UINT4
    parts = [
        layer.weight_codes.numpy() // spec.storage_gain,
        layer.weight_scale.numpy() * np.float32(spec.storage_gain),
        layer.weight_zero_point.numpy(),
    ]
    if layer.weight_codes.ndim == 2:
        parts = _group_columns(graph, codes, parts) if layer.block else _rows(graph, codes, parts)
    for value, array in zip((codes, scale, zero_point), parts, strict=True):
        stored = ir.DataType.FLOAT if value is scale else kind
        value.const_value = ir.tensor(array.astype(stored.numpy()), dtype=stored, name=value.name)
        value.type, value.shape = ir.TensorType(stored), ir.Shape(array.shape)


def _group_columns(graph: ir.Graph, codes: ir.Value, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Store groups of inputs along axis 0 where products read them so: MatMulNBits forms there."""
    nodes = [node for node, _ in codes.uses()]
    readers = [reader for node in nodes for reader, _ in node.outputs[0].uses()]
    if not all(map(_reads_turned, readers)):
        return parts
    for node in nodes:
        node.attributes["axis"] = ir.AttrInt64("axis", 0)
        _swap_axes(node.outputs[0])
    for reader in readers:
        if reader.op_type == "Gemm":
            reader.attributes["transB"] = ir.AttrInt64("transB", 0)
        else:
            stored = reader.inputs[0]
            assert stored is not None
            reader.outputs[0].replace_all_uses_with(stored)
            graph.remove(reader, safe=True)
    return [np.ascontiguousarray(part.T) for part in parts]


def _reads_turned(reader: ir.Node) -> bool:
    turns = reader.attributes.get_int("transB", 0) if reader.op_type == "Gemm" else 0
    return bool(turns) or reader.op_type == "Transpose"


def _rows(graph: ir.Graph, codes: ir.Value, parts: list[np.ndarray]) -> list[np.ndarray]:
    """Store a matrix by rows, each a block of its own: no MatMulNBits forms there."""
    nodes = [node for node, _ in codes.uses()]
    steps, scale, zero_point = parts
    if scale.ndim and nodes[0].attributes.get_int("axis") == 1:
        steps = np.ascontiguousarray(steps.T)
        for node in nodes:
            _turn_back(graph, node)
    for node in nodes:
        node.attributes["axis"] = ir.AttrInt64("axis", 1)
        node.attributes["block_size"] = ir.AttrInt64("block_size", steps.shape[1])
    return [steps, *(np.resize(values, (len(steps), 1)) for values in (scale, zero_point))]


def _turn_back(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose what ``node`` dequantizes, whose codes have changed their axes."""
    stored = node.outputs[0]
    turned = ir.Value(type=stored.type, shape=stored.shape)
    stored.replace_all_uses_with(turned)
    _swap_axes(stored)
    turn = ir.Node("", "Transpose", [stored], [ir.AttrInt64s("perm", [1, 0])], outputs=[turned])
    graph.insert_after(node, turn)


def _swap_axes(value: ir.Value) -> None:
    assert value.shape is not None
    value.shape = ir.Shape(reversed(value.shape.dims))

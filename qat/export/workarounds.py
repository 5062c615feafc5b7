"""Limits of runtimes that a valid file has to respect, all in one place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

_MOVES = {"Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def respect_limits(proto: onnx.ModelProto) -> None:
    """Rewrite what onnxruntime would refuse to run, or compute badly, in place."""
    for node in list(_integer_softmaxes(proto.graph)):
        _keep_in_float(proto.graph, node)
    for node, ratio in list(_integer_averages(proto.graph)):
        if not 2.0**-8 <= ratio < 2.0**8:  # 1.32 fails at run time a little outside of this
            _average_in_float(proto.graph, node)
    _share_no_zero_points(proto.graph)


def _share_no_zero_points(graph: onnx.GraphProto) -> None:
    """Give every weight a zero point of its own.

    With ``session.x64quantprecision`` onnxruntime 1.32 moves int8 weights to uint8 layer by layer,
    and fails at the second that has the same zero point, where the layer itself stays in float.
    """
    stored, seen = {i.name: i for i in graph.initializer}, set[str]()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored or len(node.input) < 3:
            continue
        name = node.input[2]
        if name in seen:
            copy = onnx.TensorProto()
            copy.CopyFrom(stored[name])
            copy.name = node.input[2] = f"{node.output[0]}_zero_point"
            graph.initializer.append(copy)
        seen.add(name)


def _integer_averages(graph: onnx.GraphProto) -> Iterator[tuple[NodeProto, float]]:
    """Yield every global average pool between codes, with its input scale over its output scale."""
    stored = {i.name: i for i in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def scale(node: NodeProto) -> np.ndarray:
        return numpy_helper.to_array(stored[node.input[1]])

    for node in graph.node:
        if node.op_type != "GlobalAveragePool":
            continue
        source = makers.get(node.input[0])
        readers = [n for n in graph.node if node.output[0] in n.input]
        if source is not None and source.op_type == "DequantizeLinear":
            for reader in readers:
                if reader.op_type == "QuantizeLinear":
                    yield node, float(scale(source) / scale(reader))


def _average_in_float(graph: onnx.GraphProto, node: NodeProto) -> None:
    axes = f"{node.output[0]}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), axes))
    node.op_type = "ReduceMean"
    node.input.append(axes)
    node.attribute.append(onnx.helper.make_attribute("keepdims", 1))


def _integer_softmaxes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Yield every softmax between codes: the kernel multiplies by 1 / scale *rounded down*.

    With a scale of 1/255 every weight comes out a 255th too small.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        source = makers.get(node.input[0])
        while source is not None and source.op_type in _MOVES:
            source = makers.get(source.input[0])
        readers = {n.op_type for n in graph.node if node.output[0] in n.input}
        reads_codes = source is not None and source.op_type == "DequantizeLinear"
        if reads_codes and readers == {"QuantizeLinear"}:
            yield node


def _keep_in_float(graph: onnx.GraphProto, node: NodeProto) -> None:
    """Put an operator that changes no value behind ``node``, so that no integer one forms."""
    result = node.output[0]
    node.output[0] = f"{result}_values"
    behind = onnx.helper.make_node("Abs", [node.output[0]], [result], name=f"{node.name}_float")
    graph.node.insert(list(graph.node).index(node) + 1, behind)

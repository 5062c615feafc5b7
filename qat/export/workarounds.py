"""Limits of runtimes that a valid file has to respect, all in one place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from qat.export.onnx_links import MOVES, Links

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_LARGEST_RATIO = {"Add": 2.0**22, "AveragePool": 2.0**22, "Mul": 2.0**14}
"""Input scales over output scale from which a kernel's result may leave int32, and turn over."""
_SAME = "Max"
"""Of one input it is that input, and no optimiser looks through it."""


def respect_limits(proto: onnx.ModelProto) -> None:
    """Rewrite what onnxruntime would refuse to run, or compute badly, in place."""
    graph = proto.graph
    for node in list(_integer_softmaxes(graph)):
        _put_behind(graph, node, "Abs")
    for node in list(_far_averages(graph)):
        _average_in_float(graph, node)
    for node in list(_overflowing(graph)):
        _put_behind(graph, node, _SAME)
    for node in list(_float_layers(graph)):
        _put_in_front(graph, node, _SAME)
    _share_no_zero_points(graph)


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


def _far_averages(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Yield every global average between codes whose scales are too far apart for its kernel.

    onnxruntime 1.32 fails at run time, or crashes, a little outside of these ratios.
    """
    links = Links(graph)
    for node in graph.node:
        if node.op_type == "GlobalAveragePool" and not all(
            2.0**-8 <= read / made < 2.0**8
            for read in links.scales_read(node.input[0])
            for made in links.scales_made(node.output[0])
        ):
            yield node


def _average_in_float(graph: onnx.GraphProto, node: NodeProto) -> None:
    axes = f"{node.output[0]}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), axes))
    node.op_type = "ReduceMean"
    node.input.append(axes)
    node.attribute.append(onnx.helper.make_attribute("keepdims", 1))


def _overflowing(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Yield what adds, multiplies or averages codes onto a grid that is far finer than theirs.

    The kernels of onnxruntime 1.32 round to int32 before they clip, so that what lies far above
    the output's range comes out as its lowest code.
    """
    links = Links(graph)
    for node in graph.node:
        if node.op_type in _LARGEST_RATIO:
            read = [max(links.scales_read(name), default=0.0) for name in node.input]
            finest = min(links.scales_made(node.output[0]), default=np.inf)
            total = np.prod(read) if node.op_type == "Mul" else sum(read)
            if total >= _LARGEST_RATIO[node.op_type] * finest:
                yield node


def _float_layers(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Yield every layer with a float weight that reads codes.

    Where another quantize follows, onnxruntime 1.32 (``WeightBiasQuantization``) rounds the
    weight to 8 bits of its own choice, so that an integer kernel forms.
    """
    links = Links(graph)
    for node in graph.node:
        is_float = node.op_type in _LAYERS and node.input[1] in links.float_constants
        if is_float and links.scales_read(node.input[0], dynamic=True):
            yield node


def _integer_softmaxes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """Yield every softmax between codes: the kernel multiplies by 1 / scale *rounded down*.

    With a scale of 1/255 every weight comes out a 255th too small.
    """
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "Softmax":
            continue
        source = makers.get(node.input[0])
        while source is not None and source.op_type in MOVES:
            source = makers.get(source.input[0])
        readers = {n.op_type for n in graph.node if node.output[0] in n.input}
        reads_codes = source is not None and source.op_type == "DequantizeLinear"
        if reads_codes and readers == {"QuantizeLinear"}:
            yield node


def _put_behind(graph: onnx.GraphProto, node: NodeProto, op_type: str) -> None:
    """Put an operator that changes no value behind ``node``, so that no integer one forms."""
    result = node.output[0]
    node.output[0] = f"{result}_values"
    behind = onnx.helper.make_node(op_type, [node.output[0]], [result], name=f"{node.name}_float")
    graph.node.insert(list(graph.node).index(node) + 1, behind)


def _put_in_front(graph: onnx.GraphProto, node: NodeProto, op_type: str) -> None:
    """Put an operator that changes no value in front of ``node``, so that no integer one forms."""
    values = f"{node.output[0]}_input"
    front = onnx.helper.make_node(op_type, [node.input[0]], [values], name=f"{node.name}_float")
    node.input[0] = values
    graph.node.insert(list(graph.node).index(node), front)

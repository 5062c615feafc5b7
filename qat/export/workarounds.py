"""Limits of runtimes that a valid file has to respect, all in one place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper


def respect_limits(proto: onnx.ModelProto) -> None:
    """Rewrite what onnxruntime would refuse to run, in place."""
    for node, ratio in list(_integer_averages(proto.graph)):
        if not 2.0**-8 <= ratio < 2.0**8:  # 1.32 fails at run time a little outside of this
            _average_in_float(proto.graph, node)


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

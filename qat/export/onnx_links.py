"""Which grids the values of an ONNX graph lie on: what an operator reads, and what reads it."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

MOVES = {"Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
_TRANSPARENT = MOVES | {
    *("Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Identity", "MaxPool"),
    *("Pad", "Relu", "Resize", "SpaceToDepth", "Tile"),
}
"""What an optimiser may move a quantize or a dequantize through."""
_CODES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class Links:
    """An ONNX graph, to be asked from operator to operator.

    Args:
        graph: The graph; what is asked holds until it is changed.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._stored = {i.name: i for i in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self.float_constants = self._find_constants(graph)
        """Names of what is computed from stored floats alone, and from no codes."""

    def _find_constants(self, graph: onnx.GraphProto) -> set[str]:
        floats = {n for n, i in self._stored.items() if i.data_type == TensorProto.FLOAT}
        for node in graph.node:
            reads_floats = any(name in floats for name in node.input)
            is_constant = all(n in floats or n in self._stored for n in node.input if n)
            if reads_floats and is_constant and node.op_type not in _CODES:
                floats.update(node.output)
        return floats

    def scales_read(self, name: str, *, dynamic: bool = False) -> list[float]:
        """Return the scales of the grids that the values of ``name`` come from.

        Args:
            name: A tensor of real values.
            dynamic: Whether grids of the moment count, too; their scale is 1 here.
        """
        node = self._makers.get(name)
        if node is None:
            return []
        if node.op_type == "DequantizeLinear":
            return self._scale(node, dynamic=dynamic)
        inputs = node.input if node.op_type == "Concat" else node.input[:1]
        moved = [self.scales_read(source, dynamic=dynamic) for source in inputs]
        return [s for found in moved for s in found] if node.op_type in _TRANSPARENT else []

    def scales_made(self, name: str) -> list[float]:
        """Return the scales of the grids that the values of ``name`` are rounded to."""
        found: list[float] = []
        for node in self._readers[name]:
            if node.op_type == "QuantizeLinear":
                found += self._scale(node)
            elif node.op_type in _TRANSPARENT:
                found += [s for result in node.output for s in self.scales_made(result)]
        return found

    def _scale(self, node: NodeProto, *, dynamic: bool = False) -> list[float]:
        stored = self._stored.get(node.input[1])
        if stored is None:
            return [1.0] if dynamic else []
        return [float(np.max(numpy_helper.to_array(stored)))]

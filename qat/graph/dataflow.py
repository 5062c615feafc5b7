"""Which nodes of a graph hold values of the data, and which are written into."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import clone, fx, nn

from qat.graph.op_names import op_name
from qat.graph.ops import OPS, UNCHANGED, UNKNOWN

IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem}


class Dataflow(NamedTuple):
    """What the nodes of a graph hold.

    Attributes:
        data: Those that hold values of the data.
        filled: Those of them that hold such values only since they were written into them.
        changed: Those that are written into and read afterwards.
        writes: What changes a tensor in place, to the node whose tensor that is.
        storage: Node to the node that made its memory, where it may be a view.
    """

    data: set[fx.Node]
    filled: set[fx.Node]
    changed: set[fx.Node]
    writes: dict[fx.Node, fx.Node]
    storage: dict[fx.Node, fx.Node]

    def overwritten(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Return those of ``nodes`` into whose memory anything writes, at any time."""
        memory = {self.storage[n] for n in self.writes.values()}
        return {n for n in nodes if self.storage[n] in memory}

    def aliased(self) -> set[fx.Node]:
        """Return what shares memory that is written into and read afterwards."""
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, memory in self.storage.items():
            members[memory].append(node)
        read = [members[self.storage[n]] for n in self.changed]
        return {node for same in read if len(same) > 1 for node in same}


def find_data(
    nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module], ops: Mapping[fx.Node, str]
) -> Dataflow:
    """Follow the data through a graph.

    Args:
        nodes: All nodes, in order.
        modules: Name to module of the captured model.
        ops: Node to the name of its operation.
    """
    flow, overwritten = Dataflow(set(), set(), set(), {}, {}), set[fx.Node]()
    for node in nodes:
        flow.storage[node] = _storage(node, ops[node], flow)
        flow.changed.update(n for n in node.all_input_nodes if flow.storage[n] in overwritten)
        reads = any(n in flow.data for n in node.all_input_nodes)
        if node.op == "placeholder" or (reads and not _is_size(node)):
            flow.data.add(node)
        target = written_by(node, modules)
        if target is not None:
            overwritten.add(flow.storage[target])
            flow.writes[node] = target
        if target is not None and reads and target not in flow.data:
            flow.data.add(target)
            flow.filled.add(target)
    return flow


def _storage(node: fx.Node, op: str, flow: Dataflow) -> fx.Node:
    """Return whose memory a node may share: what moves values may return a view."""
    source = node.args[0] if node.args else None
    may_view = OPS.get(op, UNKNOWN).passes and node.target not in ("clone", clone)
    return flow.storage[source] if may_view and isinstance(source, fx.Node) else node


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def written_by(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Return the node whose value a call changes in place, if it does.

    Dropout changes nothing, as graphs that quantize are those of eval mode.

    Args:
        node: A node of a captured graph.
        modules: Name to module of the captured model.
    """
    if op_name(node, modules) in UNCHANGED:
        return None
    target: Any = node.target
    first = node.args[0] if node.args else None
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op == "call_module":
        writes = getattr(modules.get(name), "inplace", False)
    else:
        is_name = name.endswith("_") and not name.endswith("__")
        writes = is_name or target in IN_PLACE or node.kwargs.get("inplace", False)
    return first if writes and isinstance(first, fx.Node) else None

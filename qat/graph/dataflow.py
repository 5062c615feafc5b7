"""Which nodes of a graph hold values of the data, and which are written into."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import fx, nn

IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem}


class Dataflow(NamedTuple):
    """What the nodes of a graph hold.

    Attributes:
        data: Those that hold values of the data.
        filled: Those of them that hold such values only since they were written into them.
        changed: Those that are written into and read afterwards.
    """

    data: set[fx.Node]
    filled: set[fx.Node]
    changed: set[fx.Node]


def find_data(nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> Dataflow:
    """Follow the data through a graph.

    Args:
        nodes: All nodes, in order.
        modules: Name to module of the captured model.
    """
    flow, overwritten = Dataflow(set(), set(), set()), set[fx.Node]()
    for node in nodes:
        flow.changed.update(overwritten & set(node.all_input_nodes))
        reads = any(n in flow.data for n in node.all_input_nodes)
        if node.op == "placeholder" or (reads and not _is_size(node)):
            flow.data.add(node)
        target = written_by(node, modules)
        if target is not None:
            overwritten.add(target)
        if target is not None and reads and target not in flow.data:
            flow.data.add(target)
            flow.filled.add(target)
    return flow


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "size"


def written_by(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """Return the node whose value a call changes in place, if it does.

    Args:
        node: A node of a captured graph.
        modules: Name to module of the captured model.
    """
    target: Any = node.target
    first = node.args[0] if node.args else None
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op == "call_module":
        writes = getattr(modules.get(name), "inplace", False)
    else:
        is_name = name.endswith("_") and not name.endswith("__")
        writes = is_name or target in IN_PLACE or node.kwargs.get("inplace", False)
    return first if writes and isinstance(first, fx.Node) else None

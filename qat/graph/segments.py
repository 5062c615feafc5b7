"""Where a graph can be cut: segments of about as many bytes, with few bytes alive between them."""

from __future__ import annotations

import itertools
import math
import operator
from typing import NamedTuple

from torch import fx, nn

from qat.fake_quant import FakeQuant
from qat.graph.chains import Chain
from qat.graph.convolutions import FirstLayer, LargeLayer
from qat.graph.op_names import module_name, op_name
from qat.layers import QuantizedLayer

NEW_MEMORY = {
    *("add", "mul", "matmul", "concat", "average_pool", "max_pool"),
    *("layer_norm", "softmax", "gelu", "embedding"),
}
"""Operations whose result is never what they read, or a view of it."""


class Part(NamedTuple):
    """Some nodes of a graph, one behind the other.

    Attributes:
        nodes: In their order.
        reads: What is alive in front of them.
        gives: What is alive behind them; empty if they are the last.
        writes: Whether they may change, in place, what they are given.
    """

    nodes: list[fx.Node]
    reads: list[fx.Node]
    gives: list[fx.Node]
    writes: bool


def split(graph: fx.Graph, modules: dict[str, nn.Module], count: int | None = None) -> list[Part]:
    """Return the parts of a graph, the last with its output.

    Args:
        graph: Any graph; it is not changed.
        modules: Name to module of its model.
        count: How many parts at most; ``None`` for the square root of the number of nodes.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]
    written, alive = _written(graph, modules), _alive(nodes, inputs)
    ends = [k for k, values in enumerate(alive) if values and written.isdisjoint(values)]
    sizes = _sizes([*inputs, *nodes], modules)
    done = list(itertools.accumulate(sizes[n] for n in nodes))
    cost = {k: sum(sizes[n] for n in alive[k]) for k in ends}
    chosen = _places(done, cost, count or round(math.sqrt(len(nodes))))
    parts, reads = [], inputs
    for first, last in itertools.pairwise([-1, *chosen, len(nodes) - 1]):
        part = nodes[first + 1 : last + 1]
        seen = {source for node in part for source in node.all_input_nodes}
        given = {*reads, *(n for n in seen if n.op == "get_attr")}
        parts.append(Part(part, reads, alive[last], not written.isdisjoint(given & seen)))
        reads = alive[last]
    return parts


def _places(done: list[int], cost: dict[int, int], count: int) -> list[int]:
    """Return where to cut: near each multiple of an equal share, where the least is alive."""
    share, found = done[-1] / count, set[int]()
    for place in (share * i for i in range(1, count)):
        off = {k: abs(done[k] - place) for k in cost}
        near = [(cost[k], off[k], k) for k in cost if off[k] <= share / 2]
        if near:
            found.add(min(near)[2])
    return sorted(found)


def _alive(nodes: list[fx.Node], inputs: list[fx.Node]) -> list[list[fx.Node]]:
    """Return what is read behind each node; parameters and buffers are always at hand."""
    last = {source: k for k, node in enumerate(nodes) for source in node.all_input_nodes}
    found, values = [], inputs
    for k, node in enumerate(nodes):
        values = [n for n in (*values, node) if last.get(n, -1) > k]
        found.append(values)
    return found


def _sizes(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> dict[fx.Node, int]:
    """Return about how many bytes nodes make; what lies on a grid can be kept as codes."""
    numel: dict[fx.Node, int] = {}
    for node in nodes:
        shape = node.meta.get("shape")
        read = max((numel.get(n, 0) for n in node.all_input_nodes), default=0)
        numel[node] = read if shape is None else math.prod(shape)
    return {n: size * (1 if _snaps(n, modules) else 4) for n, size in numel.items()}


def _snaps(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules[str(node.target)] if node.op == "call_module" else None
    return isinstance(node.target, Chain) or isinstance(module, FakeQuant)


def _written(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes whose memory may be changed once they have run."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            hit = _writes(user, node, modules)
            if hit or (user in found and not _makes_new(user, modules)):
                found.add(node)
    return found


def _writes(user: fx.Node, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether ``user`` may change, in place, what ``node`` made."""
    if user.op == "call_module":
        module = modules[str(user.target)]
        known = module_name(module) or isinstance(module, FakeQuant | QuantizedLayer)
        if not known and not type(module).__module__.startswith("torch."):
            return True  # code that nobody has looked into
        return any(getattr(m, "inplace", False) for m in module.modules())
    return bool(user.args) and user.args[0] is node and _is_in_place(user)


def _is_in_place(node: fx.Node) -> bool:
    if isinstance(node.target, Chain):
        return len(node.args) == 1 and node.target.in_place
    name = str(getattr(node.target, "__name__", node.target))
    augmented = name.startswith("i") and hasattr(operator, f"__{name}__")  # operator.iadd
    asked = any(value is True for value in [*node.args[1:], node.kwargs.get("inplace")])
    return augmented or asked or name.endswith("_") or name == "setitem"


def _makes_new(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the memory of what ``node`` makes is surely its own."""
    if isinstance(node.target, Chain):
        return len(node.args) > 1  # an addition
    module = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(module, QuantizedLayer) or isinstance(node.target, FirstLayer | LargeLayer):
        return True
    return op_name(node, modules) in NEW_MEMORY and not _is_in_place(node)

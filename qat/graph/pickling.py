"""Pickle a graph as a flat list of nodes; torch's own linked list recurses once for every node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.node import map_arg


@dataclass(frozen=True)
class _Reference:
    """Stands for a node in pickled arguments."""

    name: str


def flatten_graph(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Return ``graph`` as plain tuples; of the metadata what was measured, and its line."""

    def name(node: fx.Node) -> Any:
        return _Reference(node.name)

    def refer(args: Any) -> Any:
        return map_arg(args, name)

    def kept(node: fx.Node) -> dict[str, Any]:
        return {k: node.meta[k] for k in ("shape", "macs", "line") if k in node.meta}

    return [(n.op, n.target, refer(n.args), refer(n.kwargs), n.name, kept(n)) for n in graph.nodes]


def build_graph(rows: list[tuple[Any, ...]]) -> fx.Graph:
    """Return the graph that ``flatten_graph`` flattened."""
    graph, nodes = fx.Graph(), {}

    def resolve(args: Any) -> Any:
        if isinstance(args, _Reference):
            return nodes[args.name]
        if isinstance(args, dict):
            return {k: resolve(v) for k, v in args.items()}
        if isinstance(args, list | tuple):
            return type(args)(map(resolve, args))
        if isinstance(args, slice):
            return slice(*map(resolve, (args.start, args.stop, args.step)))
        return args

    for op, target, args, kwargs, name, meta in rows:
        node = graph.create_node(op, target, resolve(args), resolve(kwargs), name)
        assert node.name == name
        node.meta.update(meta)
        nodes[name] = node
    return graph

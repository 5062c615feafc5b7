"""The graph that training runs: the captured one, with chains as one and copies kept as codes.

Only what runs in training changes: the captured model keeps its graphs, and exports read those.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.functional.kept import rearranged
from qat.functional.products import matmul
from qat.graph.captured import Captured
from qat.graph.chains import find_chain
from qat.graph.convolutions import find_first_layer, find_large_layer
from qat.graph.memory_format import has_other_order

MOVES = ("flatten", "reshape", "contiguous")
"""Methods that copy their tensor where they must."""
PRODUCTS = (torch.matmul, operator.matmul, "matmul")


def training_graph(model: Captured) -> fx.Graph:
    """Return a graph that computes what ``model`` does in training, faster, and keeps less.

    Args:
        model: A prepared model; it is not changed.
    """
    graph, modules = fx.Graph(), dict[str, nn.Module](model.named_modules())
    graph.output(graph.graph_copy(model.graphs["train"], {}))
    for node in list(graph.nodes):
        _change(node, modules)
    return graph


def _change(node: fx.Node, modules: dict[str, nn.Module]) -> None:
    found, first = find_chain(node, modules), find_first_layer(node, modules)
    if found is not None:
        _replace(node, *found)
    elif first is not None:
        _replace(node, first[0], first[1:])
    elif node.op == "call_module":
        _change_layer(node, modules)
    elif node.op == "call_method" and node.target in MOVES and not node.kwargs:
        _replace(node, Rearrange(str(node.target)), node.args)
    elif node.target in PRODUCTS and len(node.args) == 2 and not node.kwargs:
        _replace(node, matmul, node.args)


def _change_layer(node: fx.Node, modules: dict[str, nn.Module]) -> None:
    if has_other_order(modules[str(node.target)]):
        _reorder_input(node)
    large = find_large_layer(node, modules)
    if large is not None:
        _replace(node, large, node.args)


def _reorder_input(node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    with node.graph.inserting_before(node):
        copied = node.graph.call_function(Rearrange("contiguous"), (source,))
    node.replace_input_with(source, copied)


class Rearrange:
    """A method that moves elements, as a function.

    Args:
        method: Its name.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self.__name__ = self.__qualname__ = method  # generated code calls it by name

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """Return ``x`` rearranged; a copy of what is kept as codes is kept as codes."""
        return rearranged(x, lambda t: getattr(t, self.method)(*args))


def _replace(node: fx.Node, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    with node.graph.inserting_before(node):
        one = node.graph.call_function(function, inputs)
    one.meta.update(node.meta)
    node.replace_all_uses_with(one)
    for unread in _unread(node, set(one.all_input_nodes)):
        node.graph.erase_node(unread)


def _unread(node: fx.Node, kept: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield ``node`` and, once it is gone, what nothing reads any more."""
    sources = node.all_input_nodes
    yield node
    for source in sources:
        if source not in kept and not source.users:
            yield from _unread(source, kept)

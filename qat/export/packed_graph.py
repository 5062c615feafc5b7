"""A graph out of a file as a module: an interpreter runs it, node by node.

Modules and tensors have numbers as attributes and lie in dictionaries under the names of the file,
so no name of a file can stand for anything else, and no source is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from qat.errors import ExportError
from qat.export.calls import CheckedCalls
from qat.export.memory_run import check_memory


class PackedGraph(nn.Module):
    """The converted model of a file; its ``forward`` simulates the integers in float.

    Args:
        graph: Nodes whose functions are those of ``allowed.FUNCTIONS``.
        modules: What the graph calls, by the name in the file.
        constants: What it reads, by the name in the file.

    Attributes:
        modules_by_name: The modules.
        constants: The tensors.
        meta: The ``signature`` and the ``outputs`` of the model, if its file says them.
    """

    def __init__(
        self, graph: fx.Graph, modules: Mapping[str, nn.Module], constants: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.graph = graph
        self.modules_by_name, self.constants = dict(modules), dict(constants)
        self.layers = nn.ModuleList(modules.values())
        self.meta: dict[str, Any] = {}
        self._sized: set[Any] = set()
        self._remember()
        self.eval()

    def _remember(self) -> None:
        tensors = [*self.parameters(), *self.buffers(), *self.constants.values()]
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def _apply(self, fn: Any, recurse: bool = True) -> PackedGraph:
        """Move constants, too, where the module is moved."""
        super()._apply(fn, recurse)
        self.constants = {name: fn(value) for name, value in self.constants.items()}
        self._remember()
        return self

    def check_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Refuse inputs on which the graph would take more memory than is free.

        Raises:
            ExportError: If it would, or cannot run on them at all.
        """
        shapes = tuple((tuple(x.shape), x.dtype) for x in inputs)
        if shapes not in self._sized:
            check_memory(self, self.graph, self.modules_by_name, self.constants, inputs)
            self._sized.add(shapes)

    def check_unchanged(self) -> None:
        """Refuse a graph that writes into the tensors of its file: every call would differ.

        Raises:
            ExportError: If it did.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise ExportError("an operation that changes the weights of the model")

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """Return what the graph makes of ``inputs``, real values."""
        self.check_inputs(inputs)
        run = _FloatRun(self, graph=self.graph)
        run.look_up(self.modules_by_name, self.constants)
        result = run.run(*(x.clone() for x in inputs))  # the graph may write into them
        self.check_unchanged()
        return result


class _FloatRun(CheckedCalls):
    """Run a graph as it is written."""


def to_graph_module(model: PackedGraph) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return the graph as a ``GraphModule``, for compilers, with names of our own making.

    Args:
        model: The graph of a file.

    Returns:
        The module, and for each name of a layer in it the one in the file.
    """
    root, graph = nn.Module(), fx.Graph()
    layers = {name: f"layer_{i}" for i, name in enumerate(model.modules_by_name)}
    constants = {name: f"constant_{i}" for i, name in enumerate(model.constants)}
    for name, ours in layers.items():
        root.add_module(ours, model.modules_by_name[name])
    for name, ours in constants.items():
        root.register_buffer(ours, model.constants[name])
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(model.graph.nodes):
        target, name = node.target, f"node_{i}"
        if node.op == "call_module":
            target = layers[str(target)]
        elif node.op == "get_attr":
            target = constants[str(target)]
        elif node.op == "placeholder":
            target = name
        args, kwargs = (map_arg(part, copies.__getitem__) for part in (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, target, args, kwargs, name)
        copies[node].meta.update(node.meta)
    module = fx.GraphModule(root, graph, class_name="IntegerModel").eval()
    return module, {ours: name for name, ours in layers.items()}

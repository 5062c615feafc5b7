"""Chains of batch-norm, addition, ReLU and fake-quant, which training runs as one.

Only what runs in training changes: the captured model keeps its graphs, and exports read those.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.batch_norm import Stage, StagedBatchNorm, norm_in_use
from qat.fake_quant import FakeQuant
from qat.functional.chain import can_fuse, run_chain
from qat.functional.fused import NO_CLAMP, Grid, fused_fake_quantize
from qat.graph.captured import Captured
from qat.graph.op_names import op_name

CLAMPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6}


class Chain:
    """A batch-norm, an addition and an activation function, each of them or not, and a fake-quant.

    Args:
        norm: The batch-norm, if any.
        activation: The name of the function, or ``""``, and its module, if it is one.
        fake_quant: What puts values on the grid.
    """

    def __init__(
        self,
        norm: StagedBatchNorm | None,
        activation: tuple[str, nn.Module | None],
        fake_quant: FakeQuant,
    ) -> None:
        self.norm, self.fake_quant = norm, fake_quant
        name, module = activation
        self.clamp = CLAMPS.get(name, NO_CLAMP)
        self.activation = module or FUNCTIONS.get(name)
        self.modules = [m for m in (norm, module, fake_quant) if m is not None]
        self.__name__ = self.__qualname__ = "chain"  # generated code calls it by name

    def __call__(self, c: Tensor, other: Tensor | None = None) -> Tensor:
        """Return values on the grid, shape of ``c``; made as one where all parts allow it.

        Args:
            c: What comes in.
            other: What is added behind the batch-norm.
        """
        grid = self._grid(c)
        y = None if grid is None else self._as_one(c, other, grid)
        return self._one_by_one(c, other) if y is None else y

    def _grid(self, c: Tensor) -> Grid | None:
        """Return the grid, if the fake-quant only snaps and nobody looks at what lies between."""
        looked_at = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)
        if looked_at or not self.fake_quant.only_snaps:
            return None
        quantizer = self.fake_quant.quantizer
        found, spec = quantizer.grid_of(c), quantizer.spec
        if found is None or found[0].numel() > 1 or spec.qmax - spec.qmin > 255:
            return None
        return Grid(*found[:2], spec.qmin, spec.qmax, found[2], self.clamp)

    def _as_one(self, c: Tensor, other: Tensor | None, grid: Grid) -> Tensor | None:
        if not can_fuse(c, other):
            return None
        if self.norm is None or self.norm.stage is Stage.FOLDED:
            return fused_fake_quantize(c, grid, other)
        norm = norm_in_use(self.norm, c)
        return None if norm is None else run_chain(c, other, norm, grid)

    def _one_by_one(self, c: Tensor, other: Tensor | None) -> Tensor:
        y = c if self.norm is None else self.norm(c)
        y = y if other is None else y + other
        return self.fake_quant(y if self.activation is None else self.activation(y))


def fuse_chains(model: Captured) -> Callable[..., Any]:
    """Return the training graph of ``model`` as a function in which chains run as one.

    Args:
        model: A prepared model; it is not changed.

    Returns:
        A function of the model and its input tensors.
    """
    graph, modules = fx.Graph(), dict[str, nn.Module](model.named_modules())
    graph.output(graph.graph_copy(model.graphs["train"], {}))
    for node in list(graph.nodes):
        found = _find(node, modules)
        if found is not None:
            _replace(node, found)
    graph.lint()
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"]


class _Found(NamedTuple):
    chain: Chain
    inputs: tuple[fx.Node, ...]


def _find(node: fx.Node, modules: dict[str, nn.Module]) -> _Found | None:
    """Return the chain that ends in ``node``, if one does that is longer than itself."""
    fake_quant = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(fake_quant, FakeQuant):
        return None
    first, activation = node, ("", None)
    source = _only_source(node)
    if source is not None and op_name(source, modules) in CLAMPS and not _changes(source):
        module = modules[str(source.target)] if source.op == "call_module" else None
        first, activation = source, (op_name(source, modules), module)
        source = _only_source(source)
    inputs = None if source is None else _addends(source, modules)
    alone = [] if source is None else [(source,)]
    for c, *others in inputs or alone:
        norm = _image_norm(c, modules)
        if norm is not None:
            return _Found(Chain(norm, activation, fake_quant), (c.all_input_nodes[0], *others))
    if inputs:
        return _Found(Chain(None, activation, fake_quant), inputs[0])
    if first is node:
        return None
    return _Found(Chain(None, activation, fake_quant), (first.all_input_nodes[0],))


def _only_source(node: fx.Node) -> fx.Node | None:
    """Return what ``node`` reads if it is all it reads, and nothing else reads it."""
    sources = node.all_input_nodes
    return sources[0] if len(sources) == 1 and len(sources[0].users) == 1 else None


def _changes(node: fx.Node) -> bool:
    """Whether ``node`` may change, in place, what other nodes read, too."""
    return node.target not in (operator.add, torch.add, "add") and len(node.args[0].users) > 1  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _addends(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return the two tensors that ``node`` adds, in both orders."""
    if op_name(node, modules) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b or _changes(node):
        return None
    return [(a, b), (b, a)]


def _image_norm(node: fx.Node, modules: dict[str, nn.Module]) -> StagedBatchNorm | None:
    """Return the batch-norm of images that ``node`` calls, if only one node reads it."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(module, StagedBatchNorm) or len(node.users) > 1:
        return None
    return module if isinstance(module, nn.BatchNorm2d) else None


def _replace(node: fx.Node, found: _Found) -> None:
    with node.graph.inserting_before(node):
        one = node.graph.call_function(found.chain, found.inputs)
    node.replace_all_uses_with(one)
    for unread in _unread(node, set(found.inputs)):
        node.graph.erase_node(unread)


def _unread(node: fx.Node, kept: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield ``node`` and, once it is gone, what nothing reads any more."""
    sources = node.all_input_nodes
    yield node
    for source in sources:
        if source not in kept and not source.users:
            yield from _unread(source, kept)

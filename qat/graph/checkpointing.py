"""Training that keeps less: a graph in segments, which run again when their gradients are due.

Of a segment only what it reads is kept, as codes where it lies on a grid; the rest is made again in
the backward, with the random numbers of the forward. State is that of the forward, too: whatever a
forward may move (observers, running statistics, buffers of any module) is copied in front of it;
the second run starts from there, moves copies, and leaves the model's own state alone. So gradients
and state are those of a training that keeps everything, bit for bit.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 4.
Differs: segments are of about as many bytes, and the last is kept: its gradients are due at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from qat.functional.kept import find_recipe, remember
from qat.graph.captured import Captured, make_function
from qat.graph.chains import Chain
from qat.graph.convolutions import FirstLayer, LargeLayer
from qat.graph.segments import Part, split
from qat.layers import QuantizedLayer

Context = Callable[[], AbstractContextManager[Any]]
FIXED = "weight_mask"
"""A buffer as large as a weight, which no forward moves."""


class _Switch:
    again: ClassVar[bool] = False


def runs_again() -> bool:
    """Whether what runs is computed for the second time, and has been looked at already."""
    return _Switch.again


def checkpointed(
    model: Captured, graph: fx.Graph, count: int | None = None, within: Context = nullcontext
) -> Callable[..., Any]:
    """Return a function that computes what ``graph`` does, and keeps less for the backward.

    Args:
        model: A prepared model; it is not changed.
        graph: One of its graphs.
        count: Segments at most; ``None`` for the square root of the number of nodes.
        within: Makes the context that the function will run in, for what runs again.

    Returns:
        A function of the model and its input tensors.
    """
    modules = dict[str, nn.Module](model.named_modules())
    parts = split(graph, modules, count)
    functions = [make_function(_graph_of(part)) for part in parts]
    segments = [
        _Segment(function, _called(part, modules), within) if _can_run_again(part) else function
        for function, part in zip(functions, parts, strict=True)
    ]

    def forward(self: Captured, *values: Any) -> Any:
        for segment in segments:
            values = segment(self, *values)
        return values

    return forward


def _can_run_again(part: Part) -> bool:
    return bool(part.gives) and not part.writes


def _graph_of(part: Part) -> fx.Graph:
    """Return a part as a graph from what is alive in front of it to what is alive behind it."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in part.reads}

    def find(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter or a buffer: read where it is used
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in part.nodes:
        copies[node] = graph.node_copy(node, find)
    if part.gives:
        graph.output(tuple(copies[node] for node in part.gives))
    return graph


def _called(part: Part, modules: dict[str, nn.Module]) -> list[nn.Module]:
    """Return all modules that a part runs, and those whose state its layers read."""
    found: dict[nn.Module, None] = {}
    for node in part.nodes:
        roots = [modules[str(node.target)]] if node.op == "call_module" else []
        roots += (
            node.target.modules if isinstance(node.target, Chain | FirstLayer | LargeLayer) else []
        )
        for module in (m for root in roots for m in root.modules()):
            found[module] = None
            if isinstance(module, QuantizedLayer):
                found |= dict.fromkeys(m for b in module.neighbours() for m in b.modules())
    return list(found)


class _Segment:
    """A part of a graph that is computed again in the backward."""

    def __init__(
        self, function: Callable[..., Any], modules: list[nn.Module], within: Context
    ) -> None:
        self.function, self.modules, self.within = function, modules, within

    def __call__(self, model: nn.Module, *values: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.function(model, *values)
        replay = _Replay(self.modules, self.within)
        recipes = [find_recipe(v) if isinstance(v, Tensor) else None for v in values]

        def compute(*given: Any) -> Any:
            for value, recipe in zip(given, recipes, strict=True):
                if recipe is not None and find_recipe(value) is None:
                    remember(value, recipe)  # made of its codes again, and known by them again
            return self.function(model, *given)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), replay

        return checkpoint(compute, *values, use_reentrant=False, context_fn=contexts)


class _Replay(AbstractContextManager[None]):
    """Inside, modules are as they were when it was made, and what moves is forgotten afterwards."""

    def __init__(self, modules: list[nn.Module], within: Context) -> None:
        self.modules, self.within = modules, within
        self.state = [_copied(module.__dict__) for module in modules]

    def __enter__(self) -> None:
        now = [module.__dict__ for module in self.modules]
        with contextlib.ExitStack() as stack:
            stack.callback(self._set, now, again=_Switch.again)
            self._set([_copied(then) for then in self.state], again=True)
            stack.enter_context(self.within())
            self.leave = stack.pop_all().close

    def __exit__(self, *error: object) -> None:
        self.leave()

    def _set(self, states: list[dict[str, Any]], *, again: bool) -> None:
        _Switch.again = again
        for module, attributes in zip(self.modules, states, strict=True):
            object.__setattr__(module, "__dict__", attributes)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Return attributes of a module, which share its parameters but no buffer that moves."""
    buffers = {
        name: buffer if buffer is None or name == FIXED else buffer.detach().clone()
        for name, buffer in state["_buffers"].items()
    }
    return {**state, "_buffers": buffers}

"""Capture: the user's module tree, unchanged, with one ``torch.fx`` graph for each mode.

Tracing bakes Python's ``self.training`` into a graph, so a model is traced once in train and once
in eval mode; ``forward`` runs the one that fits. The captured model shares the modules, parameters
and buffers of the model it was given: names, their order and checkpoints stay as they were.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from qat.errors import GraphError
from qat.graph.pickling import build_graph, flatten_graph

MODES = ("train", "eval")
_RESERVED = {"activations", "example", "graphs", "mode", "recompile", "source"}


class Captured(nn.Module):
    """A model that runs from its graphs.

    Args:
        model: The user's model; its tree is shared, not copied.
        graphs: Mode to graph, over the names of that tree.
        example: One batch as the model takes it, ``(N, ...)``; used to measure shapes.
    """

    def __init__(self, model: nn.Module, graphs: dict[str, fx.Graph], example: Tensor) -> None:
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers"):
            self.__dict__[kind] = dict(model.__dict__[kind])
        self._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
        self.training = model.training
        self.source = f"{type(model).__module__}.{type(model).__qualname__}"
        self.graphs = graphs
        self.example = example
        self._forwards: dict[str, Callable[..., Any]] = {}

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``."""
        return "train" if self.training else "eval"

    def forward(self, *args: Any) -> Any:
        """Run the graph of the current mode; arguments and results are the original model's."""
        if self.mode not in self._forwards:
            self.recompile()
        return self._forwards[self.mode](self, *args)

    def recompile(self) -> None:
        """Check the graphs and make Python functions of them; call it after every change."""
        for mode, graph in self.graphs.items():
            graph.lint()
            code = graph.python_code("self")
            names = dict(code.globals)
            exec(code.src, names)
            self._forwards[mode] = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        flat = {mode: flatten_graph(graph) for mode, graph in self.graphs.items()}
        return {**self.__dict__, "_forwards": {}, "graphs": flat}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graphs = {mode: build_graph(rows) for mode, rows in state["graphs"].items()}
        super().__setstate__({**state, "graphs": graphs})


class _ModeTracer(fx.Tracer):
    """Torch's own modules are leaves, as usual, and so are subclasses of its weighted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.current: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, _ConvNd | nn.Linear)
        return is_layer or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["lines"] = _current_lines()  # where both modes come by, to tell nodes apart
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.current.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.current.pop()
        return result


def capture(model: nn.Module, example: Tensor) -> Captured:
    """Trace ``model`` in both modes and check that the result computes what the model computes.

    Args:
        model: Any module with one tensor argument; it is not changed.
        example: One batch ``(N, ...)``, real values.

    Raises:
        GraphError: If the model cannot be traced, naming the line, or behaves differently captured.
    """
    _check_names(model)
    _check_runs(model, example)
    was_training, known, graphs = model.training, set(model.__dict__), {}
    try:
        for mode in MODES:
            graphs[mode] = _trace(model.train(mode == "train"))
    finally:  # taken off after both modes, so that two constants never have one name
        constants = {k: model.__dict__.pop(k) for k in set(model.__dict__) - known}
        model.train(was_training)
    constants = _share_constants(graphs, constants)
    captured = Captured(model, graphs, example)
    for name, value in constants.items():
        if isinstance(value, Tensor):
            captured.register_buffer(name, value, persistent=False)
        else:
            captured.__dict__[name] = value
    captured.recompile()
    return captured


def _share_constants(graphs: dict[str, fx.Graph], constants: dict[str, Any]) -> dict[str, Any]:
    """Let equal constants of both modes have one name; return those that are left."""
    left: dict[str, Any] = {}
    for node in [n for graph in graphs.values() for n in graph.nodes if n.target in constants]:
        value = constants[node.target]
        node.target = next((k for k, v in left.items() if _is_same(v, value)), node.target)
        left[node.target] = value
    return left


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b


def _check_names(model: nn.Module) -> None:
    taken = sorted(_RESERVED & {*model._modules, *model._parameters, *model._buffers})
    if taken:
        raise GraphError(
            f"expected a model without a module, parameter or buffer of its own named '{taken[0]}',"
            " which a captured model needs for itself: rename it, or wrap the model in another."
        )


def _check_runs(model: nn.Module, example: Tensor) -> None:
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example.clone())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise GraphError(
            f"expected a model that takes a batch of shape {tuple(example.shape)}, got "
            f"{type(error).__name__} ({reason}) at {_line_of(error)}: choose "
            "an input size, number of channels or model that fit each other."
        ) from error
    finally:
        model.train(was_training)


def _trace(model: nn.Module) -> fx.Graph:
    tracer = _ModeTracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        where = ".".join(filter(None, tracer.current[-1:])) or "the model itself"
        raise GraphError(
            f"expected a model whose forward can be traced, got {type(error).__name__} "
            f"({error}) in module '{where}' at {_line_of(error)}: replace control flow on tensor "
            "values there by tensor operations."
        ) from error
    graph._tracer_cls = None
    return graph


def _current_lines() -> tuple[int, ...]:
    lines, frame = [], sys._getframe(1)
    while frame is not None:
        lines.append(frame.f_lineno)
        frame = frame.f_back
    return tuple(lines)


def _line_of(error: BaseException) -> str:
    """Return ``file:line (code)`` of the user's code that raised ``error``."""
    torch_home = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not f.filename.startswith((torch_home, __file__))]
    frame = (mine or list(frames))[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


def check_equal(reference: nn.Module, captured: Captured, *, after: str) -> None:
    """Compare two models in both modes on the example, from the same random state.

    Both must be throw-away copies: training mode moves batch-norm statistics.

    Args:
        reference: The user's model.
        captured: The same model, captured, quantizers off.
        after: What was done last, for the message.

    Raises:
        GraphError: If the outputs differ.
    """
    x = captured.example
    for mode in reversed(MODES):
        outputs = []
        for model in (reference, captured):
            model.train(mode == "train")
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                outputs.append(model(x.clone()))
        if not _close(*outputs):
            raise GraphError(
                f"expected the model to compute the same after {after}, got other outputs in "
                f"{mode} mode: its forward depends on something that tracing cannot see."
            )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(a, dict):
        return all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return all(_close(x, y) for x, y in zip(a, b, strict=True))
    return a == b

"""Capture: from a model and an example to graphs for both modes, over the model's own modules.

Tracing bakes Python's ``self.training`` into a graph, so a model is traced once in train and once
in eval mode. What cannot be traced is left whole, from the inside out: the module in which tracing
failed becomes a leaf, and tracing starts again. The captured model shares the modules, parameters
and buffers of the model it was given: names, their order and checkpoints stay as they were.
"""

from __future__ import annotations

import logging
from copy import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.calls import Call
from qat.errors import GraphError
from qat.graph.captured import MODES, Captured
from qat.graph.fixed_norms import stay_in_evaluation
from qat.graph.lines import line_of_error
from qat.graph.tracer import ModeTracer
from qat.graph.values import is_plain
from qat.graph.views import CONTAINER, Views
from qat.outputs import Outputs
from qat.signature import Signature
from qat.trees import leaves, name_of

log = logging.getLogger("qat")
_RESERVED = {
    *(
        "activations",
        CONTAINER,
        "graphs",
        "outputs",
        "signature",
        "example",
        "leaves",
        "evaluated",
        "follows_batch",
        "converted",
        "source",
    ),
    *(name for name in vars(Captured) if not name.startswith("_")),
}
_INVISIBLE = ("size",)
"""Methods whose result nobody may have used; they do nothing else."""


def capture(model: nn.Module, example: Any, *, whole_attention: bool = False) -> Captured:
    """Trace ``model`` in both modes.

    Args:
        model: Any module; it is not changed.
        example: One batch as the model takes it: a tensor ``(N, ...)``, a tuple of arguments, or a
            dict of arguments by name.
        whole_attention: Leave attention as one operation instead of taking it apart.

    Raises:
        GraphError: If the model does not run, or its own forward cannot be traced, naming the line.
    """
    _check_names(model)
    in_evaluation = _norms_in_evaluation(model)
    call = Call.of(example)
    _check_outputs(_check_runs(model, call))
    was_training, known = model.training, set(model.__dict__)
    task = _Capture(model, call, whole_attention=whole_attention)
    modes = {module: module.training for module in model.modules()}
    try:
        graphs, outputs = task.trace()
    finally:  # taken off after both modes, so that two constants never have one name
        constants = {k: model.__dict__.pop(k) for k in set(model.__dict__) - known}
        for module, mode in modes.items():
            module.training = mode
        model.training = was_training
    constants = _share_constants(graphs, constants)
    signature = task.signature if task.follows_batch else task.signature.without_batch()
    captured = Captured(model, graphs, outputs, signature, call)
    captured.leaves, captured.follows_batch = sorted(task.leaves), task.follows_batch
    captured.add_views(task.views.modules)
    captured.evaluated = [*task.evaluated, *(f"{CONTAINER}.{key}" for key in task.views.evaluated)]
    _warn_of_modes([name for name in in_evaluation if name not in captured.evaluated])
    for name, value in constants.items():
        if isinstance(value, Tensor):
            captured.register_buffer(name, value, persistent=False)
        else:
            captured.__dict__[name] = value
    captured.recompile()
    return captured


class _Capture:
    """One capture: what both modes share, and what was given up so far."""

    def __init__(self, model: nn.Module, example: Call, *, whole_attention: bool) -> None:
        self.model, self.example, self.whole_attention = model, example, whole_attention
        self.signature = Signature.of(model, example)
        self.lengths = example.lengths[1:]
        """What else may be the number of samples in the example."""
        self.views = Views(model)
        self.leaves: set[str] = set()
        self.evaluated: list[str] = []
        self.follows_batch = True

    def trace(self) -> tuple[dict[str, fx.Graph], dict[str, Outputs]]:
        """Trace both modes, beginning again whenever something more was given up."""
        while True:
            graphs, outputs = {}, {}
            for mode in MODES:
                tracer = self._trace(mode)
                if tracer is None:
                    break
                graphs[mode], outputs[mode] = tracer.graph, tracer.outputs
            else:
                return graphs, outputs

    def _trace(self, mode: str) -> ModeTracer | None:
        whole = self.whole_attention
        called = (self.signature, self.example)
        tracer = ModeTracer(*called, self.leaves, self.views, whole_attention=whole)
        tracer.follows_batch = self.follows_batch
        self.model.train(mode == "train")
        if mode == "train":
            self.evaluated = stay_in_evaluation(self.model)
        before = _attributes(self.model)
        try:
            graph = tracer.trace(self.model)
        except Exception as error:
            self._give_up(tracer, error)
            return None
        finally:
            _forget_proxies(before)
        graph._tracer_cls = None
        for node in reversed(list(graph.nodes)):
            is_silent = node.op == "get_attr" or node.target in _INVISIBLE
            if is_silent and not node.users:
                graph.erase_node(node)
        return tracer

    def _give_up(self, tracer: ModeTracer, error: Exception) -> None:
        """Leave one more module whole; in the model itself, choose another number of samples."""
        if tracer.current and tracer.current[-1] not in self.leaves:
            self.leaves.add(tracer.current[-1])
        elif self.follows_batch and self.lengths:
            self.signature = Signature.of(self.model, self.example, self.lengths.pop(0))
            self.leaves.clear()
        elif self.follows_batch:
            self.follows_batch = False
            self.leaves.clear()
        else:
            where = ".".join(filter(None, tracer.current[-1:])) or "the model itself"
            raise GraphError(
                f"expected a model whose forward can be traced, got {type(error).__name__} "
                f"({error}) in module '{where}' at {line_of_error(error)}: replace control flow on "
                "tensor values there by tensor operations, or move it into a submodule, which is "
                "then left whole."
            ) from error


def _attributes(model: nn.Module) -> dict[nn.Module, dict[str, Any]]:
    """Return the attributes of every module, containers copied."""
    return {
        module: {k: copy(v) if isinstance(v, dict | list) else v for k, v in vars(module).items()}
        for module in model.modules()
    }


def _forget_proxies(before: dict[nn.Module, dict[str, Any]]) -> None:
    """Give back what a forward replaced by something that only exists while it is traced."""
    for module, known in before.items():
        for key, value in list(vars(module).items()):
            held = value.values() if isinstance(value, dict) else value
            held = held if isinstance(value, dict | list | tuple) else [value]
            if not any(isinstance(v, fx.Proxy) for v in held):
                continue
            if key in known:
                module.__dict__[key] = known[key]
            else:
                del module.__dict__[key]


def _norms_in_evaluation(model: nn.Module) -> list[str]:
    """Return the names of batch-norms in eval mode, if the model itself is in training."""
    found = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and not m.training]
    return found if model.training else []


def _warn_of_modes(norms: list[str]) -> None:
    """Say that batch-norms which somebody else put into eval mode follow ``train()``, as always."""
    if norms:
        log.warning(
            "%d batch-norms are in eval mode in a model that is in training, first '%s': as in any "
            "PyTorch model, train() lets them follow batches again; to keep them fixed, override "
            "train() in the model, or call eval() on them behind every train()",
            len(norms),
            norms[0],
        )


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


def _check_outputs(result: Any) -> None:
    for path, leaf in leaves(result):
        if not isinstance(leaf, Tensor) and not is_plain(leaf):
            raise GraphError(
                "expected a model that returns tensors and numbers in tuples, lists, dictionaries "
                f"and dataclasses, got {type(leaf).__name__} at '{name_of(path) or 'output'}': "
                "switch it off (caches of transformers: use_cache=False), or return its tensors."
            )


def _check_runs(model: nn.Module, call: Call) -> Any:
    was_training = model.training
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with torch.no_grad():
            result = call.on_copies(model.eval())
            for name, value in model.named_buffers():
                if name in buffers and value.shape == buffers[name].shape:
                    value.copy_(buffers[name])  # others are caches, made for this size
            return result
    except Exception as error:
        reason = str(error).partition("\n")[0]
        shapes = [tuple(x.shape) for x in call.tensors]
        raise GraphError(
            f"expected a model that takes a batch of shape {', '.join(map(str, shapes))}, got "
            f"{type(error).__name__} ({reason}) at {line_of_error(error)}: {_remedy(error)}."
        ) from error
    finally:
        model.train(was_training)


def _remedy(error: Exception) -> str:
    if isinstance(error, TypeError) and "argument" in str(error):
        return (
            "pass arguments by position as a tuple, by name as a mapping, and a mapping or tuple "
            "that is one argument as (argument,)"
        )
    return "choose an input size, number of channels or model that fit each other"

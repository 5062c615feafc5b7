"""What a node would compute, found out without computing: fake tensors of two batch sizes.

A number that is the same for both batch sizes is a plain number to the code that is traced, so
that control flow and arithmetic on shapes run as they are; one that differs follows the batch, and
stays in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from qat.graph.macs import MacCounter

PLAIN = (int, float, bool, str, bytes, type(None), torch.dtype, torch.layout, torch.memory_format)
_KEEPS_SHAPE = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.Dropout, nn.Identity, nn.Softmax, nn.LeakyReLU, nn.ELU),
}
_STORES = ("_parameters", "_buffers", "_modules")
_CALL, _GETATTR = nn.Module.__call__, nn.Module.__getattr__


class Values:
    """Node to its value, once for each batch size.

    Args:
        model: The model that the graph belongs to.
        find: Name to module, for ``call_module`` nodes.
    """

    def __init__(self, model: nn.Module, find: Callable[[str], nn.Module]) -> None:
        self.model, self.find = model, find
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.of: dict[fx.Node, tuple[Any, ...]] = {}

    def set_input(self, node: fx.Node, example: Tensor, *, more: bool) -> None:
        """Give a placeholder its example, and the same with one sample more.

        Args:
            node: The placeholder.
            example: Real values or integers. Shape ``(...)``.
            more: Whether it has a batch, and the graph is for any number of samples.
        """
        second = torch.cat([example, example[:1]]) if more else example
        self.of[node] = tuple(self.fake.from_tensor(x.detach()) for x in (example, second))
        node.meta["shape"], node.meta["macs"] = self.shape(node), 0

    def evaluate(self, node: fx.Node, batch: int) -> tuple[Any, ...]:
        """Find the values of ``node``, and note the first one's shape and its cost.

        Args:
            node: A node whose inputs have values.
            batch: Samples in the example's batch; ``meta["macs"]`` is for one of them.
        """
        module = self.find(str(node.target)) if node.op == "call_module" else None
        counter = MacCounter()
        if type(module) in _KEEPS_SHAPE:
            self.of[node] = self.of[node.all_input_nodes[0]]
        else:
            with counter.watch(module):
                first = self._run(node, 0, counter)
            self.of[node] = (first, self._run(node, 1, MacCounter()))
        inner = {k: (shape, macs // batch) for k, (shape, macs) in counter.layers.items()}
        node.meta.update(macs=counter.macs // batch, inner=inner, shape=self.shape(node))
        found = tree_leaves(self.of[node][0])
        node.meta["is_real"] = any(map(_is_real, found))
        node.meta["has_integers"] = any(map(_is_integer, found))
        return self.of[node]

    def shape(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape of a node that makes a tensor of real values, else ``None``."""
        value = self.of[node][0]
        return tuple(value.shape) if _is_real(value) else None

    def _run(self, node: fx.Node, which: int, counter: MacCounter) -> Any:
        def value(n: fx.Node) -> Any:
            if n not in self.of:  # a tensor of the model itself, recorded as an argument
                self.evaluate(n, 1)
            return self.of[n][which]

        args = map_arg(node.args, value)
        kwargs = map_arg(node.kwargs, value)
        with torch.no_grad():
            if node.op == "get_attr":
                return self._attribute(str(node.target))
            if node.op == "call_module":
                with _untraced():
                    return self._leaf(self.find(str(node.target)), args, kwargs, counter)
            with self.fake, counter:
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    def _attribute(self, name: str) -> Any:
        value: Any = self.model
        for part in name.split("."):
            value = _member(value, part)
        return self.fake.from_tensor(value.detach()) if isinstance(value, Tensor) else value

    def _leaf(self, module: nn.Module, args: Any, kwargs: Any, counter: MacCounter) -> Any:
        try:
            named = (*module.named_parameters(), *module.named_buffers())
            state = {name: self._as_fake(value) for name, value in named}
            with self.fake, counter:  # on fakes of its own tensors: a leaf may write into them
                return functional_call(module, state, args, kwargs)
        except Exception:  # its control flow looks at values: only real ones can tell the shapes
            counter.reset()
            twin = deepcopy(module)  # its hooks too
            real_args, real_kwargs = tree_map(_random, (args, kwargs))
            with torch.random.fork_rng(devices=[]), counter:
                result = twin(*real_args, **real_kwargs)
            return tree_map(self._as_fake, result)

    def _as_fake(self, value: Any) -> Any:
        return self.fake.from_tensor(value.detach()) if isinstance(value, Tensor) else value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _random(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=value.dtype)
    return torch.zeros(value.shape, dtype=value.dtype)


@contextmanager
def _untraced() -> Iterator[None]:
    """Give modules their own calls and attributes back while a leaf runs inside a trace.

    Not for free: Python looks at every subclass of ``nn.Module`` that is imported.
    """
    patched = nn.Module.__call__, nn.Module.__getattr__
    nn.Module.__call__, nn.Module.__getattr__ = _CALL, _GETATTR
    try:
        yield
    finally:
        nn.Module.__call__, nn.Module.__getattr__ = patched


def _member(owner: Any, name: str) -> Any:
    """Return an attribute without the ``__getattr__`` of modules, which a trace has replaced."""
    for store in _STORES if isinstance(owner, nn.Module) else ():
        if name in vars(owner)[store]:
            return vars(owner)[store][name]
    return getattr(owner, name)


def _is_integer(value: Any) -> bool:
    """Whether ``value`` is a tensor of integers or booleans."""
    real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return isinstance(value, Tensor) and not real


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, a name or a format, or a tuple or list of such."""
    if isinstance(value, tuple | list):
        return all(map(is_plain, value))
    return isinstance(value, PLAIN)

"""The tracer: records a forward pass in one mode, with values at hand.

Leaves are torch's own modules without children, and weighted layers that compute what torch's own
compute; what cannot be traced becomes a leaf as well. Functions that someone asked ``torch.fx`` to
leave whole are looked into all the same, fused attention and contractions are taken apart, a
functional layer becomes a view.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _wrapped_fns_to_patch
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from qat.calls import Call
from qat.graph import attention
from qat.graph.einsum import contract, find_indices
from qat.graph.fixed_norms import frozen_forwards
from qat.graph.lines import current_line, current_lines
from qat.graph.proxy import FACTORIES, ValueDecisionError, ValueProxy, factory
from qat.graph.values import Values, is_plain
from qat.graph.views import Views
from qat.outputs import Output, Outputs, describe_leaf
from qat.signature import Signature
from qat.subclass import has_own_forward
from qat.trees import Path, flatten, leaves

_LAYERS = (_ConvNd, nn.Linear, nn.Embedding)


class ModeTracer(fx.Tracer):
    """Trace a model in the mode it is in.

    Args:
        signature: How the model is called.
        example: What it is called with.
        leaves: Names of modules to leave whole.
        views: Where functional layers find their modules.
        whole_attention: Leave attention as one operation.
    """

    follows_batch = True
    """Whether the graph is for any number of samples."""

    def __init__(
        self,
        signature: Signature,
        example: Call,
        leaves: set[str],
        views: Views,
        *,
        whole_attention: bool,
    ) -> None:
        super().__init__()
        self.signature, self.example = signature, example
        self.leaves, self.views = leaves, views
        self.whole_attention = whole_attention
        self.proxy_buffer_attributes = True  # else writing into one would happen while tracing
        self.current: list[str] = []
        self.outputs = Outputs(())

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Return the graph of ``root`` in its present mode; nothing of it is changed."""
        del concrete_args
        self.frozen = frozen_forwards(root)
        self.values = Values(root, lambda name: self.views.find(name) or root.get_submodule(name))
        with _patched_factories(self), patch.dict(_wrapped_fns_to_patch, clear=True):
            return super().trace(root)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Make a placeholder for every tensor that the model is called with."""
        del root_fn, is_module, concrete_args
        proxies = []
        tensors = self.signature.flatten(self.example.args, self.example.kwargs)
        for place, tensor in zip(self.signature.inputs, tensors, strict=True):
            node = self.create_node("placeholder", _identifier(place.name), (), {})
            self.values.set_input(node, tensor, more=self.follows_batch and place.has_batch)
            proxies.append(self.proxy(node))

        def call_user(*tensors: Any) -> Any:
            example = self.signature.fill(self.example, tensors)
            result = type(self.root).forward(self.root, *example.args, **example.kwargs)
            values, spec = flatten(result)
            self.outputs = Outputs(map(self._describe, leaves(result)), spec)
            return values[0] if self.outputs.is_alone else values

        return call_user, proxies

    def _describe(self, leaf: tuple[Path, Any]) -> Output:
        path, x = leaf
        is_proxy = issubclass(type(x), ValueProxy)  # proxies pretend to be of other types
        return describe_leaf(path, self.values.of[x.node] if is_proxy else (x, x))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is called as it is."""
        if module_qualified_name in self.leaves:
            return True
        if isinstance(m, _LAYERS):
            return not has_own_forward(type(m))
        opens = bool(m._modules) or isinstance(m, nn.Sequential)  # an empty one is an identity
        return m.__module__.startswith("torch.nn.") and not opens

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record or look into a module; one that is made on the way has no name, and is opened."""
        if m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.current.append(path)
        run = partial(attention.multi_head, m) if self._takes_apart(m, path) else forward
        run = run if path in self.leaves else self.frozen.get(m, run)
        result = super().call_module(m, run, args, kwargs)
        self.current.pop()
        return result

    def _takes_apart(self, m: nn.Module, path: str) -> bool:
        whole = self.whole_attention or path in self.leaves
        return not whole and attention.can_take_apart(m)

    def create_arg(self, a: Any) -> Any:
        """Lower an argument; proxies of any kind first, whatever they pretend to be."""
        if issubclass(type(a), fx.Proxy):
            return a.node
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> ValueProxy:
        """Return the proxy of a node, with its values."""
        if node not in self.values.of:
            self.values.evaluate(node, self.signature.samples)
        proxy = ValueProxy(node, self)
        proxy.fakes = self.values.of[node]
        return proxy

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> Any:
        """Record one operation, unless its result is known or made of smaller ones."""
        inner = self._inside(kind, target, args)
        if inner is not None:
            return inner(*args, **kwargs)
        if kind == "call_function":
            view = self.views.record(self, target, args, kwargs)
            if view is not None:
                return view
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        a, b = proxy.fakes
        if target is not operator.setitem and is_plain(a) and is_plain(b) and a == b:
            self.graph.erase_node(proxy.node)
            return a
        return proxy

    def _inside(self, kind: str, target: Any, args: Any) -> Callable[..., Any] | None:
        """Return what an operation is made of, where it should be recorded in parts."""
        if kind != "call_function":
            return None
        if target is F.scaled_dot_product_attention and not self.whole_attention:
            return attention.scaled_dot_product
        if target is F.multi_head_attention_forward:
            raise ValueDecisionError("fused attention")
        indices = find_indices(args[0], args[1:]) if target is torch.einsum else None
        return None if indices is None else lambda _, a, b: contract(indices, a, b)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node with the lines that are running, by which modes are paired, and its own."""
        node = super().create_node(*args, **kwargs)
        node.meta["lines"] = current_lines()
        node.meta["line"] = current_line("call_user")
        return node


def _identifier(name: str) -> str:
    return "_".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split())


@contextmanager
def _patched_factories(tracer: fx.Tracer) -> Iterator[None]:
    originals = {name: getattr(torch, name) for name in FACTORIES}
    for name in FACTORIES:
        setattr(torch, name, factory(name, tracer))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)

"""Proxies that know their values, so that Python code on shapes runs while it is traced."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import Attribute

from qat.graph.values import is_plain


class ValueDecisionError(Exception):
    """Python code wants to know a value that only real data can tell, or that follows the batch."""


class ValueProxy(fx.Proxy):
    """Stands for what a node makes; ``fakes`` are values of two batch sizes."""

    fakes: tuple[Any, ...]

    def __getattr__(self, k: str) -> Any:
        value = self.fakes[0]
        if k == "shape" and isinstance(value, Tensor):
            return self._size()
        if k in ("device", "data") or not isinstance(value, Tensor):
            return self._attribute(k)
        found = getattr(value, k)
        if callable(found):
            return Attribute(self, k)
        return found if is_plain(found) else self._attribute(k)

    def _attribute(self, k: str) -> Any:
        if callable(getattr(self.fakes[0], k)):
            return Attribute(self, k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def size(self, dim: int | None = None) -> Any:
        """Return the size, as ``Tensor.size`` does; what follows the batch is a proxy."""
        return self._size() if dim is None else self._size()[dim]

    def _size(self) -> tuple[Any, ...]:
        sizes = list(zip(*(v.shape for v in self.fakes), strict=True))
        if all(a == b for a, b in sizes):
            return self.fakes[0].shape
        return Size(
            a if a == b else self.tracer.create_proxy("call_method", "size", (self, i), {})
            for i, (a, b) in enumerate(sizes)
        )

    def __bool__(self) -> bool:
        return bool(self._known("a decision"))

    def __index__(self) -> int:
        return operator.index(self._known("a whole number"))

    def __int__(self) -> int:
        return int(self._known("a whole number"))

    def __float__(self) -> float:
        return float(self._known("a number"))

    def __len__(self) -> int:
        a, b = (len(v) for v in self.fakes)
        return a if a == b else self._refuse("a length")

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # pyright: ignore[reportIndexIssue]

    def __contains__(self, item: Any) -> bool:
        return any(item is x or bool(item == x) for x in self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def _known(self, what: str) -> Any:
        a, b = self.fakes
        if isinstance(a, Tensor) or a != b:
            return self._refuse(what)
        return a

    def _refuse(self, what: str) -> Any:
        why = "tensor values" if isinstance(self.fakes[0], Tensor) else "the number of samples"
        raise ValueDecisionError(f"{what} here depends on {why}")


class Size(tuple[Any, ...]):
    """A shape of which some entries follow the batch."""

    def numel(self) -> Any:
        """Return the product of all entries."""
        result: Any = 1
        for n in self:
            result = result * n
        return result

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Size(found) if isinstance(index, slice) else found


FACTORIES = (
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "zeros"),
    "tensor",
)
"""Functions of torch that do not notice a proxy among their sizes by themselves."""


def factory(name: str, tracer: fx.Tracer) -> Any:
    """Return ``torch.<name>``, making a node of calls with a proxy among the arguments."""
    original = getattr(torch, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        map_aggregate(
            (args, kwargs), lambda x: found.append(x) if isinstance(x, fx.Proxy) else None
        )
        if found:
            return tracer.create_proxy("call_function", original, args, kwargs)
        return original(*args, **kwargs)

    return wrapper

"""What layers and fake-quants make of their parameters, once where evaluation reads it often."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Held(NamedTuple):
    """What a layer made.

    Attributes:
        read: What it is made of.
        versions: Of ``read``, when it was made.
        made: It, by name.
    """

    read: list[Tensor]
    versions: list[int]
    made: dict[str, Any]

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` makes, the same again until something that it reads changes."""
        versions = [-1 if x.is_inference() else x._version for x in self.read]
        if versions != self.versions:
            self.versions[:] = versions
            self.made.clear()
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


class Holder(nn.Module):
    """A module that can hold what is made of its parameters.

    Attributes:
        held: ``None`` where everything is made anew each time.
    """

    held: Held | None = None

    def neighbours(self) -> list[nn.Module]:
        """Return other modules that the layer reads."""
        return []


def held_once(make: Callable[[Any], Value]) -> Callable[[Any], Value]:
    """Make a method of a ``Holder`` return the same again inside ``hold``, without gradients."""

    @functools.wraps(make)
    def get(layer: Holder) -> Value:
        if layer.held is None or torch.is_grad_enabled():
            return make(layer)
        return layer.held.get(make.__name__, lambda: make(layer))

    return get


@contextlib.contextmanager
def hold(model: nn.Module) -> Iterator[None]:
    """Inside, layers make their weights in use and their integers once, fake-quants their codecs.

    Phases must not change meanwhile; parameters and ranges may. Each weight is there twice.

    Args:
        model: Any model; only its quantized layers and fake-quants hold anything.
    """
    layers = [module for module in model.modules() if isinstance(module, Holder)]
    for layer in layers:
        modules = [layer, *layer.neighbours()]
        read = [x for m in modules for x in (*m.parameters(), *m.buffers())]
        layer.held = Held(read, [], {})
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("held", None)

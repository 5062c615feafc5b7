"""Dynamic subclasses: give a module of any class more behaviour in place; it still pickles."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

_OWN = ("torch.nn.", "qat.")


def _rebuild(base: type[nn.Module], mixin: type[nn.Module]) -> nn.Module:
    return subclass(base, mixin).__new__(subclass(base, mixin))


def reduce_subclass(module: nn.Module, mixin: type[nn.Module]) -> Any:
    """Pickle by the original class: a class made at run time has no importable name.

    Args:
        module: A module that was specialised.
        mixin: What it was specialised with.
    """
    return _rebuild, (original_class(module), mixin), module.__dict__


@cache
def subclass(base: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """Return the class that is ``mixin`` in front of ``base``; the same object each time.

    Args:
        base: The module's own class.
        mixin: The class whose methods and properties win.
    """
    return type(f"Quantized{base.__name__}", (mixin, base), {"__module__": __name__})


def specialise(module: nn.Module, mixin: type[nn.Module], **state: object) -> None:
    """Put ``mixin`` in front of the class of ``module``, in place, with attributes ``state``.

    Args:
        module: The module to change.
        mixin: What goes in front of its class.
        **state: Plain attributes that the mixin needs; none of them a parameter or a module.
    """
    module.__dict__.update(state)
    module.__class__ = subclass(type(module), mixin)


def generalise(module: nn.Module, *state: str) -> None:
    """Undo ``specialise``: give the original class back and drop the attributes ``state``.

    Args:
        module: A module that was specialised.
        *state: Names of the attributes that came with the mixin.
    """
    for name in state:
        del module.__dict__[name]
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that ``module`` had before ``specialise``."""
    return type(module).__bases__[1]


def has_own_forward(kind: type[nn.Module]) -> bool:
    """Whether a subclass of a layer computes something else than the layer of torch.

    Args:
        kind: The class, before ``specialise``.
    """
    methods = [getattr(kind, name, kind.forward) for name in ("forward", "_conv_forward")]
    return not all(m.__module__.startswith(_OWN) for m in methods)


def plain_twin(module: nn.Module, **parameters: Any) -> nn.Module:
    """Return a module of the original class that computes with ``parameters`` in place of its own.

    Args:
        module: A module that was specialised; it is not changed.
        **parameters: A tensor, or ``None``, for every parameter of the original class.
    """
    kind = original_class(module)
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)  # of this one module alone
    twin._parameters, twin._buffers, twin._modules = dict(parameters), {}, {}
    return twin

"""Run the graph of a file: its nodes may call what ``allowed.py`` lists, on values, and no more.

Names of a file are keys of a dictionary here. None becomes an attribute or a piece of source, so
none can reach a method of the object that runs the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.errors import ExportError
from qat.export.allowed import FUNCTIONS, LARGEST

_LONGEST = 4096  # of a tuple: sizes have a few entries, a batch that was unbound some hundreds
_HIGHEST_POWER = 64
_CUTS = ("unbind", "split", "chunk", "tensor_split")
_NUMBERED = ("chunk", "tensor_split")  # these take how many parts, split how large one is
_OPERATORS = {f for name, f in FUNCTIONS.items() if name.startswith("operator.")}
_ADDITIONS = (operator.add, operator.iadd)
_READS = (operator.getitem, operator.eq, operator.ne)


class CheckedCalls(fx.Interpreter):
    """An interpreter whose modules and tensors lie in dictionaries, by the names of a file.

    Attributes:
        submodules: What ``call_module`` may call.
        constants: What ``get_attr`` may read.
    """

    constants: Mapping[str, Tensor]

    def look_up(self, modules: Mapping[str, nn.Module], constants: Mapping[str, Tensor]) -> None:
        """Say what the names of the graph stand for."""
        self.submodules, self.constants = dict(modules), constants
        self.extra_traceback = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor of the file."""
        del args, kwargs
        return self.constants[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module of the file."""
        return self.submodules[target](*args, **kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of a tensor.

        Raises:
            ExportError: If it would be another object's.
        """
        if not (args and isinstance(args[0], Tensor)):
            raise ExportError(f"a method {target} of {_kind(args[:1])}, which is no tensor")
        _check_parts(str(target), args, kwargs)
        return getattr(args[0], target)(*args[1:], **kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function of the list.

        Raises:
            ExportError: If its arguments would make it more than arithmetic.
        """
        return checked_call(target, args, kwargs)


def checked_call(target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return ``target(*args, **kwargs)`` where its arguments are what arithmetic takes.

    Python's own operators could repeat a text or raise a number until memory is full, so that
    without a tensor they take numbers, and tuples to read and to join.

    Raises:
        ExportError: If they are anything else.
    """
    if "out" in kwargs:
        raise ExportError(f"an argument out of {_name(target)}")
    if _is_random(target, args, kwargs):
        raise ExportError(f"{_name(target)} with random results")
    _check_parts(_name(target), args, kwargs)
    if target is getattr:
        if not isinstance(args[0], Tensor):
            raise ExportError(f"an attribute of {_kind(args[:1])}, which is no tensor")
    elif target in _OPERATORS and not any(isinstance(value, Tensor) for value in args):
        return _on_numbers(target, args)
    return target(*args, **kwargs)


def _is_random(target: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    if target is F.dropout:
        return bool(kwargs.get("training", args[2] if len(args) > 2 else True))
    if target is F.scaled_dot_product_attention:
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    return False


def _check_parts(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse to cut a tensor into more parts than a model has uses for."""
    if name not in _CUTS or not (args and isinstance(args[0], Tensor)):
        return
    given = [*args[1:], *(value for key, value in kwargs.items() if key != "dim")]
    place = 1 if name == "unbind" else 2
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    size = 1 if name == "unbind" else given[0]
    if isinstance(size, list | tuple):
        parts = len(size)
    else:
        parts = size if name in _NUMBERED else args[0].shape[dim] // max(1, size)
    if parts > _LONGEST:
        raise ExportError(f"{name} into {parts:,} parts")


def _on_numbers(target: Callable[..., Any], args: Any) -> Any:
    if any(isinstance(value, str | bytes | dict) for value in args) or target is operator.setitem:
        raise _refused(target, args)
    are_numbers = all(isinstance(value, int | float) for value in args)
    if target is operator.pow and not (are_numbers and abs(args[1]) <= _HIGHEST_POWER):
        raise _refused(target, args)
    if not are_numbers and target not in (*_ADDITIONS, *_READS):
        raise _refused(target, args)
    result = target(*args)
    if isinstance(result, int) and abs(result) >= LARGEST:
        raise _refused(target, args)
    if target in _ADDITIONS and isinstance(result, tuple | list) and len(result) > _LONGEST:
        raise _refused(target, args)
    return result


def _refused(target: Callable[..., Any], args: Any) -> ExportError:
    return ExportError(f"{_name(target)} of {_kind(args)}")


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", str(target))


def _kind(args: Any) -> str:
    return " and ".join(type(value).__name__ for value in args) or "nothing"

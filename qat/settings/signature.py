"""What a class or function takes: the names of its parameters, and kinds from annotations."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal, Union

from qat.errors import ConfigError
from qat.kinds import FILE, FLAG, NULL, TEXT, Kind, each, number, table, whole

ANYTHING = Kind("anything", lambda value: True)  # noqa: ARG005 (the signature of all tests)
PLAIN: dict[Any, Kind] = {
    int: whole(),
    float: number(),
    bool: FLAG,
    str: TEXT,
    Path: FILE,
    os.PathLike: FILE,
    types.NoneType: NULL,
}
LISTS = (list, tuple, set, Sequence, Iterable)


@dataclass(frozen=True)
class Signature:
    """Parameter names to their kinds, and whether there may be others."""

    kinds: Mapping[str, Kind]
    is_open: bool


def locate(target: object, key: str) -> Any:
    """Import what a ``_target_`` names.

    Args:
        target: A dotted name, such as ``torch.optim.SGD``.
        key: Where it stands, for messages.

    Raises:
        ConfigError: If there is no such class or function.
    """
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(
            f"expected {key}._target_ to be a dotted name such as package.module.Class, got "
            f"{target!r}: correct it."
        )
    names, depth, found = target.split("."), 1, _import(target.partition(".")[0], key, target)
    for name in names[1:]:
        depth += 1
        path = ".".join(names[:depth])
        if not hasattr(found, name) and _has_module(found, path):
            _import(path, key, target)
        if not hasattr(found, name):
            raise ConfigError(
                f"No '{name}' in {'.'.join(names[: depth - 1])}: is {key}._target_={target} "
                "spelled right?"
            )
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(
            f"expected {key}._target_ to name a class or function, got {target}, which is a "
            f"{type(found).__name__}: correct it."
        )
    return found


def _has_module(package: Any, path: str) -> bool:
    return hasattr(package, "__path__") and importlib.util.find_spec(path) is not None


def _import(module: str, key: str, target: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"No module named '{error.name}', which {key}._target_={target} needs: is its package "
            "installed and spelled right? Install its package, or correct the name."
        ) from error
    except Exception as error:  # whatever somebody's module does when it is imported
        raise ConfigError(
            f"expected {key}._target_={target} to be a module that can be imported, got "
            f"{type(error).__name__} ({error}): correct the module."
        ) from error


def signature(target: Callable[..., Any]) -> Signature:
    """Return what ``target`` takes; ``**kwargs`` of a class are what its bases take."""
    kinds: dict[str, Kind] = {}
    is_open = True
    for function in _functions(target):
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return Signature(kinds, is_open=True)
        hints, is_open = _hints(function), False
        for parameter in parameters:
            if parameter.kind is parameter.VAR_KEYWORD:
                passed = typing.get_args(hints.get(parameter.name))
                is_open = not passed
                kinds |= {k: kind_of(v) for k, v in _hints(passed[0]).items()} if passed else {}
            elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name != "self":
                kind = kind_of(hints.get(parameter.name, Any), parameter.default)
                kinds.setdefault(parameter.name, kind)
        if not is_open:
            break
    return Signature(kinds, is_open)


def _functions(target: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    if not inspect.isclass(target):
        yield target
        return
    for owner in target.__mro__:
        if owner is object:
            yield lambda: None
        elif "__init__" in vars(owner):
            yield owner.__init__


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that only type checkers import
        return {}


def kind_of(annotation: Any, default: object = inspect.Parameter.empty) -> Kind:
    """Return the kind of plain values that fit an annotation, or are like the default.

    Args:
        annotation: A type.
        default: The parameter's default value, if it has one.
    """
    kind = _annotated(annotation)
    if kind is ANYTHING or default in (None, inspect.Parameter.empty):
        return kind | NULL if kind is not ANYTHING and default is None else kind
    return kind if kind.fits(default) else kind | _annotated(type(default))


def _annotated(annotation: Any) -> Kind:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        kinds = [_annotated(argument) for argument in arguments]
        return ANYTHING if ANYTHING in kinds else reduce(or_, kinds)
    if origin is Literal:
        return _literal(arguments)
    if (origin or annotation) in LISTS:
        return each(_annotated(arguments[0]) if arguments else ANYTHING)
    if (origin or annotation) in (dict, Mapping):
        return table(*map(_annotated, arguments or (Any, Any)))
    return PLAIN.get(annotation) or PLAIN.get(origin) or _instance(annotation, origin)


def _literal(arguments: tuple[Any, ...]) -> Kind:
    def fits(value: object) -> bool:
        return any(value == a and type(value) is type(a) for a in arguments)

    return Kind(" or ".join(map(str, arguments)), fits, tuple(map(str, arguments)))


def _instance(annotation: Any, origin: Any) -> Kind:
    if not inspect.isclass(annotation) or annotation in (object, Any) or origin is not None:
        return ANYTHING
    return Kind(f"a {annotation.__name__}", lambda value: isinstance(value, annotation))

"""Parts of the user's own: modules that a run imports, and words that these register.

A word such as ``quantizer=mine`` means nothing until the module that registers it has been
imported. A run imports what its config names under ``imports``; what a config out of a file names
is imported only where the user permits it (``qat/stored_config.py``).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, TypeVar

from qat.errors import ConfigError, reason
from qat.kinds import WORD, Kind, each, require

T = TypeVar("T")
OURS = "qat"
MODULE = Kind(
    "the name of a module such as package.module",
    lambda value: isinstance(value, str) and all(p.isidentifier() for p in value.split(".")),
)
MODULES = each(MODULE)


def import_modules(names: Any) -> None:
    """Import modules, which may register words.

    Args:
        names: A list of dotted names.

    Raises:
        ConfigError: If it is none, or a module cannot be imported.
    """
    require("imports", names, MODULES)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever somebody's module does when it is imported
            raise ConfigError(
                f"expected imports to name modules that can be imported, got {reason(error)} from "
                f"{name}: correct the name or the module, or put its folder on PYTHONPATH."
            ) from error


def is_module(name: str) -> bool:
    """Return whether a dotted name is that of a module, and not of what is inside one."""
    try:
        return MODULE.fits(name) and importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def modules_of(classes: Iterable[type]) -> list[str]:
    """Return the modules that a later process has to import for classes that are not ours."""
    found = {kind.__module__ for kind in classes}
    return sorted(m for m in found if m != "__main__" and m.partition(".")[0] != OURS)


def register_word(words: MutableMapping[str, type[T]], word: str, base: type[T]) -> Callable:
    """Return a decorator that gives a class a word; again for the same class does nothing.

    Args:
        words: Word to class.
        word: The new word.
        base: What the class has to derive from.

    Raises:
        ConfigError: If the word is another class's, or the class no ``base``.
    """
    require("the word to register", word, WORD)

    def register(kind: type[T]) -> type[T]:
        known = words.get(word, kind)
        if not (isinstance(kind, type) and issubclass(kind, base)) or _path(known) != _path(kind):
            raise ConfigError(
                f"expected a {base.__name__} for the new word '{word}', got {kind!r} beside "
                f"{words.get(word)!r}: derive it from {base.__name__}, or choose another word."
            )
        words[word] = kind
        return kind

    return register


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

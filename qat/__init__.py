"""Quantization-aware training: from a float checkpoint to a small, verified integer model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qat.compile_cache import ensure_compile_cache

if TYPE_CHECKING:
    from qat.errors import QatError
    from qat.graph.convert import convert
    from qat.graph.insert import prepare
    from qat.reference.chip import ChipRun
    from qat.reference.run import IntegerRun
    from qat.runtimes.packed_model import PackedModel
    from qat.spec import QuantSpec, Rule, Scheme

_PLACES = {
    "ChipRun": "reference.chip",
    "IntegerRun": "reference.run",
    "PackedModel": "runtimes.packed_model",
    "QatError": "errors",
    "QuantSpec": "spec",
    "Rule": "spec",
    "Scheme": "spec",
    "convert": "graph.convert",
    "prepare": "graph.insert",
}
__all__ = [
    "ChipRun",
    "IntegerRun",
    "PackedModel",
    "QatError",
    "QuantSpec",
    "Rule",
    "Scheme",
    "convert",
    "prepare",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a command must listen to signals at once."""
    if name not in _PLACES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qat.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


ensure_compile_cache()

"""Arguments of a graph's nodes as JSON and back.

Numbers, texts, booleans, ``None`` and lists are themselves. All else is an object with one entry
that says what it is: ``{"node": "relu"}``, ``{"tuple": [...]}``, ``{"dtype": "float32"}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qat.errors import ExportError
from qat.export.allowed import DTYPES, LARGEST

_WORD = re.compile(r"[\w ,.>-]{0,400}", re.ASCII)
"""What texts are for: names of modes, equations of einsum, keys."""


def encode(value: Any) -> Any:
    """Return an argument as JSON.

    Raises:
        ExportError: If it is of a kind that has no form there.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return _check_plain(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is slice:
        return {"slice": [encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {str(k): encode(v) for k, v in value.items()}}
    return _encode_constant(value)


def _encode_constant(value: Any) -> Any:
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    raise ExportError(f"an argument of type {type(value).__name__} ({value!r})")


def decode(form: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Return the argument that ``encode`` made ``form`` of.

    Args:
        form: JSON.
        nodes: The nodes so far, by name.

    Raises:
        ExportError: If it has another form, or names a node that does not come before.
    """
    if isinstance(form, list):
        return [decode(v, nodes) for v in form]
    if not isinstance(form, dict):
        return _check_plain(form)
    if len(form) != 1:
        raise ExportError(f"an argument {form!r}")
    ((kind, content),) = form.items()
    if kind == "node" and content in nodes:
        return nodes[content]
    if kind in ("tuple", "slice") and isinstance(content, list):
        values = tuple(decode(v, nodes) for v in content)
        return values if kind == "tuple" else slice(*values)
    if kind == "dict" and isinstance(content, dict):
        return {_check_plain(k): decode(v, nodes) for k, v in content.items()}
    return _decode_constant(kind, content)


def _check_plain(value: Any) -> Any:
    """Return a number, a text of few characters, a boolean or ``None``."""
    is_large = isinstance(value, int) and abs(value) >= LARGEST
    if is_large or (isinstance(value, str) and not _WORD.fullmatch(value)):
        raise ExportError(f"an argument {value!r:.100}")
    return value


def _decode_constant(kind: str, content: Any) -> Any:
    if kind == "number" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "dtype" and content in DTYPES:
        return DTYPES[content]
    if kind == "device" and content in ("cpu", "cuda", "mps", "xpu"):
        return torch.device(content)
    if kind == "ellipsis":
        return ...
    raise ExportError(f"an argument {{{kind!r}: {content!r}}}")

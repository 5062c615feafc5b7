"""What an exported file says about its inputs and classes, checked before it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.errors import ExportError
from qat.export.runtime import OnnxModel

MOST_VALUES = 1 << 27
"""Of one sample: half a gigabyte of floats."""
LEAST_STD = 1e-30
"""Whose inverse is a float32."""


def check_model(model: OnnxModel, file: Path) -> None:
    """Check that a model takes float samples of one shape.

    Raises:
        ExportError: If it takes or returns something else.
    """
    inputs = model.session.get_inputs()
    if len(inputs) != 1:
        raise ExportError(
            f"expected one input in a model to predict images or rows with, got "
            f"{', '.join(x.name for x in inputs)} in '{file}': call it from Python, "
            "qat.export.runtime.OnnxModel(path)(...), with the arguments of the trained model."
        )
    if model.signature is None and len(model.call.outputs) != 1:
        raise _refuse(file, "one output", f"{len(model.call.outputs)} outputs")
    shape = inputs[0].shape
    are_sizes = len(shape) > 1 and all(type(size) is int and size > 0 for size in shape[1:])
    if inputs[0].type != "tensor(float)" or not are_sizes or math.prod(shape[1:]) > MOST_VALUES:
        wanted = f"an input (N, ...) of floats, at most {MOST_VALUES} a sample"
        raise _refuse(file, wanted, f"{inputs[0].type} {shape}")


def check_facts(facts: Mapping[str, Any], model: OnnxModel, file: Path) -> None:
    """Check classes, mean and std in the metadata of a model.

    Raises:
        ExportError: If they are of another type, or do not fit the model.
    """
    classes = facts["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _refuse(file, "a list of names as classes", _shorten(classes))
    outputs = model.prediction_shape
    if len(outputs) != 2 or (type(outputs[1]) is int and outputs[1] != len(classes)):
        raise _refuse(file, f"logits (N, {len(classes)}), one a class", f"an output {outputs}")
    for key in ("mean", "std"):
        if not _is_channels(facts[key], model.input_shape[0], above_zero=key == "std"):
            wanted = f"a number for each of {model.input_shape[0]} channels, or one, as {key}"
            wanted += " (above 0)" if key == "std" else ""
            raise _refuse(file, wanted, _shorten(facts[key]))


def _is_channels(values: Any, channels: int, *, above_zero: bool) -> bool:
    if values is None:
        return True
    if not isinstance(values, list) or len(values) not in (1, channels):
        return False
    if not all(type(value) in (int, float) and abs(value) < 1e38 for value in values):
        return False
    return not above_zero or all(value >= LEAST_STD for value in values)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def _refuse(file: Path, wanted: str, found: str) -> ExportError:
    return ExportError(
        f"expected {wanted} in a model to predict with, got {found} in '{file}': export it again."
    )

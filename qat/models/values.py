"""Whether the tensors of a checkpoint hold values that the model can be given as they are."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.errors import CheckpointError, printable

REMEDY = "start from another file, or save the float model's state_dict() again"


def check_dense(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse tensors that are more, or less, than a block of numbers.

    Args:
        state: Tensors by name.
        path: Their file, for the message.

    Raises:
        CheckpointError: If one is sparse, quantized, nested, without values or of another class.
    """
    for name, tensor in state.items():
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not is_plain or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            raise CheckpointError(
                f"expected dense tensors with values in {printable(path)}, got "
                f"{printable(name, 90)} of type {type(tensor).__name__}, layout {tensor.layout}, "
                f"dtype {tensor.dtype} on device {tensor.device}: {REMEDY}."
            )


def check_values(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path
) -> None:
    """Refuse tensors whose copy would not be the numbers that the file holds.

    Args:
        expected: The model's tensors by name.
        state: Dense ones of the file, of the same shapes; others of the model may be missing.
        path: The file, for the message.

    Raises:
        CheckpointError: If one holds whole or complex numbers for real ones, is not finite, or is a
            variance below 0.
    """
    for name, tensor in state.items():
        if problem := _problem(name, tensor, expected[name].dtype):
            raise CheckpointError(
                f"expected finite {str(expected[name].dtype).removeprefix('torch.')} values in "
                f"{printable(name)} of {printable(path)}, got {problem}: {REMEDY}."
            )


def _problem(name: str, tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Say what is wrong with the values of a tensor; None if nothing is."""
    if tensor.is_complex() or (dtype.is_floating_point and not tensor.is_floating_point()):
        return f"{tensor.dtype}"
    try:
        values = tensor.to(dtype) if dtype.is_floating_point else tensor
        wrong = values.numel() - int(torch.isfinite(values).sum())
    except RuntimeError:  # a type that torch can store and not convert
        return f"{tensor.dtype}"
    if wrong:
        return f"{wrong} of {values.numel()} that are NaN or infinite"
    if name.endswith("running_var") and values.numel() and float(values.min()) < 0:
        return f"a variance of {float(values.min()):g}"
    return None

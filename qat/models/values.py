"""Whether the tensors of a checkpoint hold values that the model can be given as they are."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qat.errors import CheckpointError, printable


def check_values(
    expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: str | Path
) -> None:
    """Refuse tensors whose copy would not be the numbers that the file holds.

    Args:
        expected: The model's tensors by name.
        state: Those of the file, of the same shapes; others of the model may be missing.
        path: The file, for the message.

    Raises:
        CheckpointError: If one is not dense, has no values, holds whole or complex numbers for real
            ones, is not finite, or is a variance below 0.
    """
    for name, tensor in state.items():
        if problem := _problem(name, tensor, expected[name].dtype):
            raise CheckpointError(
                f"expected finite {str(expected[name].dtype).removeprefix('torch.')} values in "
                f"{printable(name)} of {printable(path)}, got {problem}: save the float model's "
                "state_dict() as it was before the error."
            )


def _problem(name: str, tensor: Tensor, dtype: torch.dtype) -> str | None:
    """Say what is wrong with a tensor; None if nothing is."""
    if type(tensor) is not Tensor or tensor.is_quantized or tensor.is_nested:
        return "a quantized or nested tensor, or one of a class of its own"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_meta:
        return "a tensor without values, of device meta"
    if tensor.is_complex() or (dtype.is_floating_point and not tensor.is_floating_point()):
        return f"{tensor.dtype}"
    return _wrong_values(name, tensor, dtype)


def _wrong_values(name: str, tensor: Tensor, dtype: torch.dtype) -> str | None:
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

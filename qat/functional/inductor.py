"""Functions of elements, compiled by Inductor into one loop each, for tensors of every size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST_GRAPHS = 64
"""Of one function: layouts, types, phases; torch keeps fewer by default, and then none is used."""
_ALL_IN_ONE_LOOP = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 1000
)
_ON_CUDA = {"eager_numerics.division_rounding": True}  # a division there is a product otherwise


def compile_for(device_type: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled for tensors of every size.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        function: Computes each element from a few others; what it uses twice is computed twice.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    options: Any = {**_ALL_IN_ONE_LOOP, **(_ON_CUDA if device_type == "cuda" else {})}
    return torch.compile(function, dynamic=True, options=options)


@functools.cache
def bound(code: float, device: torch.device) -> Tensor:
    """Return the end of a grid as the tensor that kernels take, so that no width is compiled in."""
    return torch.tensor(float(code), device=device)


def as_bytes(codes: Tensor) -> Tensor:
    """Return whole numbers from 0 to 255 as uint8; straight from float would not be vectorised."""
    return codes.to(torch.int32).to(torch.uint8)

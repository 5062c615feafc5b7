"""Matrix products that keep their factors as they come, and so as codes if those are known.

torch copies factors that are transposed or split into heads, and keeps the copies, in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.matmul(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a = torch.matmul(grads[0], b.mT) if ctx.needs_input_grad[0] else None
        return of_a, torch.matmul(a.mT, grads[0]) if ctx.needs_input_grad[1] else None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.matmul(a, b)``; batches of matrices keep ``a`` and ``b`` for the backward."""
    if a.ndim < 3 or a.shape[:-2] != b.shape[:-2] or torch.is_autocast_enabled(a.device.type):
        return torch.matmul(a, b)
    return _Product.apply(a, b)

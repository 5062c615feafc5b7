"""Batch-norms that never follow batches: kept in evaluation by their model, or of a frozen class.

Detectors are fine-tuned so: with few images a device, statistics of a batch say little. What stays
in evaluation when a model is told to train is asked of the model itself. Frozen classes, which
torchvision, Detectron2 and DETR have each, multiply and add in their forward; recorded as the
batch-norm that they are, they fold into the layer in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

FROZEN_CLASS = "FrozenBatchNorm"
BUFFERS = {"weight", "bias", "running_mean", "running_var"}


def stay_in_evaluation(model: nn.Module) -> list[str]:
    """Return the names of modules that are in eval mode though ``model`` was told to train."""
    return [name for name, module in model.named_modules() if name and not module.training]


def frozen_forwards(model: nn.Module) -> dict[nn.Module, Callable[[Any], Any]]:
    """Return the modules of frozen classes, and forwards of theirs that call ``F.batch_norm``.

    Those of such a name that compute something else are left out.

    Args:
        model: The user's model, while nothing of it is traced.
    """
    found = {module: _forward(module) for module in model.modules() if _is_frozen_class(module)}
    return {module: forward for module, forward in found.items() if _is_same(module, forward)}


def _is_frozen_class(module: nn.Module) -> bool:
    tensors = {*module._buffers.keys(), *module._parameters.keys()}
    named = any(FROZEN_CLASS in kind.__name__ for kind in type(module).__mro__)
    return named and not module._modules and tensors >= BUFFERS


def _forward(norm: Any) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        statistics, affine = (norm.running_mean, norm.running_var), (norm.weight, norm.bias)
        eps = float(getattr(norm, "eps", 1e-5))
        return F.batch_norm(x, *statistics, *affine, training=False, eps=eps)

    return forward


@torch.no_grad()
def _is_same(module: Any, forward: Callable[[Any], Any]) -> bool:
    mean = module.running_mean
    x = torch.linspace(-3, 3, 16 * mean.numel()).to(mean).view(4, mean.numel(), 2, 2)
    try:
        return torch.allclose(module.forward(x), forward(x), rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        return False

"""How far the running statistics of batch-norms are from those that a batch has now.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086,
which compares them by the Kullback-Leibler divergence of normal distributions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat.batch_norm import Stage, StagedBatchNorm
from qat.calls import on_batch


def normal_divergence(mean: Tensor, var: Tensor, of_mean: Tensor, of_var: Tensor) -> Tensor:
    """Return the divergence of one normal distribution from another, shape of the arguments.

    Args:
        mean: Of the distribution that is true.
        var: Its variance, positive.
        of_mean: Of the distribution that is used instead.
        of_var: Its variance, positive.
    """
    spread = (var + (mean - of_mean).square()) / of_var
    return 0.5 * ((of_var / var).log() + spread - 1)


@torch.no_grad()
def measure_divergence(model: nn.Module, batch: Any) -> dict[str, float]:
    """Return, for every batch-norm in use, the divergence of its running statistics from a batch's.

    Args:
        model: A prepared model, in eval mode.
        batch: A tensor ``(N, ...)``, or a tuple or mapping of arguments.

    Returns:
        Name to the mean over channels; batch-norms that are folded are left out.
    """
    found: dict[str, float] = {}

    def look(name: str) -> Any:
        def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
            features = args[0].float().movedim(1, 0).flatten(1)
            var, mean = torch.var_mean(features, dim=1)
            pairs = (mean, var + norm.eps, norm.running_mean, norm.running_var + norm.eps)
            found[name] = normal_divergence(*pairs).mean().item()

        return hook

    handles = [
        norm.register_forward_pre_hook(look(name))
        for name, norm in model.named_modules()
        if isinstance(norm, StagedBatchNorm) and norm.stage <= Stage.FROZEN
        if norm.running_mean is not None
    ]
    try:
        if handles:
            on_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found

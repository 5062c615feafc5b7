"""Batch-norm statistics measured again, as the quantized model makes them.

Source: Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural
Networks", NeurIPS 2019; Nagel et al., arXiv:2203.11086: oscillating weights corrupt the running
statistics, so that they are estimated anew when training of the weights is nearly over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.batch_norm import Stage, batch_norms
from qat.calls import on_batch, on_device
from qat.kinds import FLAG, require, whole
from qat.training.callbacks.milestone import Milestone
from qat.training.phases import is_quantized
from qat.training.task import QATTask


@torch.no_grad()
def reestimate(model: nn.Module, batches: Sequence[Any]) -> int:
    """Set the running statistics of live batch-norms to their mean over ``batches``, in place.

    Batch-norms normalise with the batch, all else is in eval mode. Statistics from before stay in
    use until all batches have passed, as the grids of folded weights hang on them.

    Args:
        model: A prepared model; its mode comes back.
        batches: Inputs ``(N, ...)``, or tuples or mappings of arguments, of the same size.

    Returns:
        How many batch-norms were set.
    """
    norms: list[Any] = [
        norm for norm in batch_norms(model) if norm.stage is Stage.LIVE and tracks(norm)
    ]
    was_training, momenta = model.training, [norm.momentum for norm in norms]
    before = [_statistics(norm) for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    sums = [torch.zeros_like(values) for values in before]
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # running statistics are then the batch's
        for batch in batches:
            on_batch(model, on_device(batch, next(model.parameters()).device))
            for norm, total, values in zip(norms, sums, before, strict=True):
                total.add_(_statistics(norm) / len(batches))
                _set(norm, values)
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
        model.train(was_training)
    for norm, total in zip(norms, sums, strict=True):
        _set(norm, total)
    return len(norms)


def tracks(norm: Any) -> bool:
    """Whether a batch-norm has running statistics."""
    return norm.running_mean is not None


def _statistics(norm: Any) -> Tensor:
    return torch.stack([norm.running_mean, norm.running_var])


def _set(norm: Any, statistics: Tensor) -> None:
    norm.running_mean.copy_(statistics[0])
    norm.running_var.copy_(statistics[1])


class ReestimateBatchNorm(Milestone):
    """Re-estimate batch-norms in front of the step that freezes them; stand before that callback.

    Args:
        num_batches: Training batches, under evaluation transforms.
        every_validation: Whether to do it in front of every validation of the quantized model, too.

    Raises:
        ConfigError: If there are no batches, or ``every_validation`` is neither true nor false.
    """

    name = "freeze_batch_norm"
    title = "reestimate batch-norms"

    def __init__(self, num_batches: int = 50, every_validation: bool = False) -> None:
        super().__init__()
        require("callbacks.reestimate_batch_norm.num_batches", num_batches, whole(1))
        require("callbacks.reestimate_batch_norm.every_validation", every_validation, FLAG)
        self.num_batches, self.every_validation = num_batches, every_validation

    def act(self, trainer: pl.Trainer, task: QATTask) -> None:
        """Re-estimate the statistics of batch-norms that are live."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        with torch.autocast(task.device.type, enabled=False):
            reestimate(task.model, data.calibration_batches(self.num_batches))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Re-estimate where that is asked for and the model is quantized."""
        assert isinstance(pl_module, QATTask)
        if self.every_validation and is_quantized(pl_module.model):
            self.act(trainer, pl_module)

"""Progressive lowering: train at many bits first, then at fewer, each width with fresh ranges.

Source: Zhuang et al., "Towards Effective Low-bitwidth Convolutional Neural Networks", CVPR 2018,
arXiv:1711.00205, progressive quantization of bit-widths; used from 32 to 2 bits by Li et al.,
arXiv:1909.13144.
"""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from torch import nn

from qat.errors import ConfigError
from qat.fake_quant import FakeQuant, activation_quants, weight_quants
from qat.kinds import require, whole
from qat.training.callbacks.calibrate import observe
from qat.training.task import QATTask

log = logging.getLogger("qat")


def widths(quants: list[FakeQuant], least: int) -> dict[FakeQuant, int]:
    """Return the bits of every site where no site has fewer than ``least``.

    Args:
        quants: Fake-quants.
        least: Bits; sites of more keep their own.
    """
    return {quant: max(least, quant.own_bits) for quant in quants}


class LowerBits(pl.Callback):
    """Give every site the bits that the schedule has for the step; stand in front of ``Calibrate``.

    What gets fewer bits is observed again, weights first, and its scales start without momentum.
    The bits are part of the saved state of every site, so there is nothing to save here.

    Args:
        num_batches: Training batches, under evaluation transforms, to observe activations on.

    Raises:
        ConfigError: If there are none.
    """

    def __init__(self, num_batches: int = 8) -> None:
        require("callbacks.lower_bits.num_batches", num_batches, whole(1))
        self.num_batches = num_batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a schedule that leaves a site above its own bits.

        Raises:
            ConfigError: If it does.
        """
        del trainer
        assert isinstance(pl_module, QATTask)
        bits, quants = pl_module.schedule.bits, _quants(pl_module.model)
        lowest = min((q.own_bits for q in quants), default=1)
        if bits and min(bits) > lowest:
            raise ConfigError(
                f"expected schedule.bits to end at the {lowest} bits of the scheme, got "
                f"{dict(bits)}: add {lowest} with its moment."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lower the bits if their moment has come."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        least = pl_module.schedule.least_bits(trainer.global_step, pl_module.total_steps)
        if least is not None:
            self._lower(trainer, pl_module, least)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give every site its own bits, if training ended before their moment."""
        assert isinstance(pl_module, QATTask)
        self._lower(trainer, pl_module, 1)

    def _lower(self, trainer: pl.Trainer, task: QATTask, least: int) -> None:
        wanted = widths(_quants(task.model), least)
        changed = [quant for quant, bits in wanted.items() if quant.bits != bits]
        for quant in changed:
            quant.use_bits(wanted[quant])
            for parameter in quant.quantizer.parameters():
                trainer.optimizers[0].state.pop(parameter, None)
        active = [quant for quant in changed if quant.active]
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for weights, count in ((True, 1), (False, self.num_batches)):
            again = [quant for quant in active if quant.quantizer.has_batch is not weights]
            if again:
                observe(task.model, again, data.calibration_batches(count))
        if changed and trainer.is_global_zero:
            log.info("step %d: %d bits or more", trainer.global_step, least)


def _quants(model: nn.Module) -> list[FakeQuant]:
    return [*weight_quants(model), *activation_quants(model)]

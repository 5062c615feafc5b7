"""Gradual magnitude pruning of the weights that are quantized."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from qat.errors import ConfigError, TrainingError
from qat.kinds import FRACTION, TEXT, WORD, number, require_all, whole
from qat.layers import QuantizedLayer, quantized_layers
from qat.pruning.magnitude import cubic_ratio, parse_pattern, prune_mask
from qat.training.task import QATTask

KINDS = {
    "ratio": number(0, below=1),
    "pattern": WORD,
    "start": FRACTION,
    "end": FRACTION,
    "every_n_steps": whole(1),
    "layers": WORD,
    "skip": TEXT,
}


class Prune(pl.Callback):
    """Raise the share of zero weights along a cubic ramp; masks act in front of the fake-quant.

    Args:
        ratio: Share of each layer's weights to prune in the end, 0 to 1.
        pattern: ``"unstructured"`` or ``"N:M"`` (N of M consecutive inputs stay).
        start: Where the ramp starts, as a fraction of the run.
        end: Where it ends.
        every_n_steps: Optimizer steps between two updates of the masks.
        layers: Glob patterns of layer names, separated by ``|``.
        skip: Glob patterns of layer names to leave alone.

    Raises:
        ConfigError: If a value is out of range.
    """

    def __init__(
        self,
        ratio: float,
        pattern: str = "unstructured",
        start: float = 0.0,
        end: float = 0.5,
        every_n_steps: int = 10,
        layers: str = "*",
        skip: str = "",
    ) -> None:
        values = {"ratio": ratio, "pattern": pattern, "start": start, "end": end, "layers": layers}
        values |= {"every_n_steps": every_n_steps, "skip": skip}
        require_all("pruning.", values, KINDS)
        if start > end:
            raise ConfigError(
                f"expected pruning.start <= pruning.end, got {start} > {end}: correct them."
            )
        kept = parse_pattern(pattern)
        self.ratio = 1 - kept[0] / kept[1] if kept else ratio
        self.pattern, self.start, self.end = pattern, start, end
        self.every_n_steps = every_n_steps
        self.layers, self.skip = layers, skip
        self.current = 0.0

    def targets(self, model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
        """Return the layers to prune.

        Raises:
            ConfigError: If there are none.
        """
        found = [
            (name, layer)
            for name, layer in quantized_layers(model)
            if _matches(name, self.layers) and not _matches(name, self.skip)
        ]
        if not found:
            raise ConfigError(
                f"expected pruning.layers='{self.layers}' without '{self.skip}' to match a "
                "quantized layer, got none: correct the patterns."
            )
        return found

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give every layer its mask before any state is loaded."""
        del trainer, stage
        assert isinstance(pl_module, QATTask)
        self.add_masks(pl_module.model)

    def add_masks(self, model: nn.Module) -> None:
        """Register a mask of ones at every target that has none."""
        for _, layer in self.targets(model):
            if "weight_mask" not in layer._buffers:
                layer.register_buffer("weight_mask", torch.ones_like(layer.raw_weight))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune all at once if there is nothing to train."""
        if trainer.max_epochs == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Update the masks where the ramp has moved."""
        del batch, batch_idx
        assert isinstance(pl_module, QATTask)
        if trainer.global_step % self.every_n_steps == 0:
            self._prune_to(pl_module, trainer.global_step / max(1, pl_module.total_steps))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish the ramp and check that the share was reached.

        Raises:
            TrainingError: If a layer has fewer zeros than asked for.
        """
        del trainer
        self._prune_to(pl_module, 1.0)
        assert isinstance(pl_module, QATTask)
        for name, layer in self.targets(pl_module.model):
            self._check(name, layer)

    def _prune_to(self, task: pl.LightningModule, progress: float) -> None:
        assert isinstance(task, QATTask)
        span = max(self.end - self.start, 1e-9)
        ratio = cubic_ratio((progress - self.start) / span, self.ratio)
        if ratio <= self.current:
            return
        for _, layer in self.targets(task.model):
            layer.weight_mask.copy_(prune_mask(layer.raw_weight, ratio, self.pattern))
        self.current = ratio

    def _check(self, name: str, layer: QuantizedLayer) -> None:
        kept = parse_pattern(self.pattern)
        if kept and layer.weight_mask.shape[1] % kept[1]:
            return
        got, wanted = 1 - layer.weight_mask.mean().item(), self.ratio
        if got < wanted - 1 / layer.weight_mask.numel():
            raise TrainingError(
                f"expected {wanted:.1%} zero weights in layer '{name}', got {got:.1%}: "
                "the pruning ramp did not finish; let it end earlier (pruning.end)."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how far the ramp has come."""
        return {"current": self.current}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how far the ramp had come."""
        self.current = state_dict["current"]


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, p.strip()) for p in patterns.split("|") if p.strip())

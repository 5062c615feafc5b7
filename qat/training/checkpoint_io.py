"""Training checkpoints on disk: written whole and read back before the older one goes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qat.errors import CheckpointError
from qat.files import replacing

AVERAGES = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
"""What optimizers of PyTorch keep for each parameter, in its shape."""


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, of which a kill or a full disk leaves the older one as it was."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside ``path``, flush, read back, replace.

        Raises:
            OSError: If it cannot be written, or what is read back is not what was written.
        """
        del storage_options
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(content.getbuffer())
            stream.flush()
            _check_checksums(stream.name)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing but tensors and plain values is ever built.

        Raises:
            CheckpointError: If it cannot be read.
        """
        del map_location, weights_only
        return read_checkpoint(path, mmap=False)


class CheckOptimizers(pl.Callback):
    """Compare what a checkpoint brought for the optimizers with what they need, before a step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at rates, counters, options, and tensors of every parameter.

        Raises:
            CheckpointError: If one is missing or has another shape.
        """
        del pl_module
        if wrong := _without_numbers(trainer):
            raise CheckpointError(
                "expected a checkpoint with numbers for rates and counters, got other values in "
                f"{wrong[0]}: resume from another .ckpt of the run."
            )
        for optimizer in trainer.optimizers:
            if wrong := _unfit(optimizer):
                raise CheckpointError(
                    f"expected a checkpoint with the state of {type(optimizer).__name__}, got one "
                    f"whose {wrong[0]} is missing or of another shape: resume from another .ckpt "
                    "of the run."
                )


def _without_numbers(trainer: pl.Trainer) -> list[str]:
    """Return schedules of rates, and counters of loops, that a step would stumble over."""
    schedules = [
        f"lr_schedulers {i}"
        for i, c in enumerate(trainer.lr_scheduler_configs)
        if not _fits(c.scheduler)
    ]
    counters = {k: v for k, v in trainer.fit_loop.state_dict().items() if k.endswith("progress")}
    return schedules + [
        k for k, v in counters.items() if not all(type(n) in (int, bool) for n in tree_leaves(v))
    ]


def _fits(scheduler: Any) -> bool:
    """Whether what a schedule of rates counts and multiplies is numbers, one for each group."""
    groups, state = len(scheduler.optimizer.param_groups), vars(scheduler)
    rates = [state[name] for name in ("base_lrs", "_last_lr") if name in state]
    counts = [state[name] for name in ("last_epoch", "_step_count") if name in state]
    return all(type(n) is int for n in counts) and all(
        isinstance(values, list) and len(values) == groups and all(map(_is_number, values))
        for values in rates
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor)


def _unfit(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return options and averages of parameters that a step would stumble over."""
    groups = optimizer.param_groups
    missing = [key for group in groups for key in optimizer.defaults if key not in group]
    return missing + [
        name
        for parameter, state in optimizer.state.items()
        for name in AVERAGES & state.keys()
        if state[name] is not None and getattr(state[name], "shape", None) != parameter.shape
    ]


def _check_checksums(path: str) -> None:
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise OSError(f"'{path}' reads back other than it was written, in {broken}")


def read_checkpoint(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """Return a checkpoint of a run.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        CheckpointError: If it cannot be read, or is no checkpoint of ours.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        raise CheckpointError(
            f"expected a checkpoint of a run, got {size:,} bytes at '{path}' that cannot be read "
            f"({type(error).__name__}): resume from another .ckpt of the run, or start it anew "
            "without ckpt_path."
        ) from error
    if not isinstance(saved, Mapping) or not isinstance(_config(saved), Mapping):
        raise CheckpointError(
            f"expected a checkpoint of a run, got other content in '{path}': to start from its "
            "weights use ckpt=... in place of ckpt_path=..."
        )
    return dict(saved)


def _config(saved: Mapping[str, Any]) -> Any:
    values = saved.get("hyper_parameters")
    return values.get("config") if isinstance(values, Mapping) else None


def read_settings(path: Path) -> Mapping[str, Any]:
    """Return the config of the run that wrote a checkpoint.

    Raises:
        CheckpointError: If it cannot be read, or is no checkpoint of ours.
    """
    return _config(read_checkpoint(path))

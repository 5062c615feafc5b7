"""Batch-norm with a saved stage: live, frozen, and in the fold stage part of the layer in front.

One that has no such layer becomes a multiplication and an addition: elementary operations, which
every runtime rounds alike, where fused normalisations differ in their last bit.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from qat.functional.chain import Norm, Running, frozen_norm, live_norm
from qat.subclass import generalise, reduce_subclass, specialise


class Stage(enum.IntEnum):
    """What a batch-norm does."""

    LIVE = 0
    """Normalises with the batch's statistics in training, and follows them."""
    FROZEN = 1
    """Normalises with its running statistics, always."""
    FOLDED = 2
    """Nothing: it is part of the layer in front."""
    AFFINE = 3
    """Multiplies and adds by its running statistics: no layer in front could take it."""


class StagedBatchNorm(nn.Module):
    """Mixin of the dynamic batch-norm subclass: the saved stage, and statistics over all ranks."""

    stage: Stage
    synchronised: bool
    fixed: bool

    def forward(self: Any, x: Tensor) -> Tensor:
        """Normalise ``x``, shape ``(N, C, ...)``, as the stage says."""
        if self.stage is Stage.FOLDED:
            return x
        if self.stage is Stage.AFFINE:
            return channel_affine(x, channel_gain(self), channel_shift(self)).to(x.dtype)
        if self.stage is Stage.FROZEN:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.training and self.synchronised and _num_ranks() > 1:
            return _synchronised_batch_norm(self, x)
        return super().forward(x)

    def get_extra_state(self) -> Tensor:
        """Return the stage as a tensor."""
        return torch.tensor([int(self.stage)], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what ``get_extra_state`` gave."""
        self.stage = Stage(int(state.item()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_subclass(self, StagedBatchNorm)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _synchronised_batch_norm(norm: Any, x: Tensor) -> Tensor:
    """Batch-norm over the global batch; torch's own SyncBatchNorm refuses the CPU."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    count = x.numel() / x.shape[1] * _num_ranks()
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = all_reduce(x.float().sum(axes)) / count
    centred = x.float() - mean.view(shape)
    variance = all_reduce(centred.square().sum(axes)) / count
    if norm.track_running_stats:
        _follow(norm, mean, variance, count)
    y = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


@torch.no_grad()
def _follow(norm: Any, mean: Tensor, variance: Tensor, count: float) -> None:
    """Move the running statistics towards those of a batch with ``count`` values a channel."""
    share = _next_share(norm)
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), share)


def _next_share(norm: Any) -> float:
    """Count a batch, and return what it counts for."""
    norm.num_batches_tracked += 1
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


def norm_in_use(norm: Any, c: Tensor) -> Norm | None:
    """Return what a batch-norm does to images, following them where it is live; or ``None``.

    Args:
        norm: A staged batch-norm, live or frozen.
        c: Images ``(N, C, H, W)`` that ``find_images`` knows.
    """
    live = norm.stage is Stage.LIVE and norm.training
    over_ranks = live and norm.synchronised and _num_ranks() > 1
    if norm.stage > Stage.FROZEN or not norm.track_running_stats or over_ranks:
        return None
    affine, running = (norm.weight, norm.bias, norm.eps), (norm.running_mean, norm.running_var)
    if live:
        return live_norm(c, *affine, Running(*running, _next_share(norm)))
    return frozen_norm(c, *affine, Running(*running))


def channel_gain(norm: Any) -> Tensor:
    """Return what a batch-norm multiplies each channel by, shape ``(C,)``, with its own eps."""
    inverse = torch.rsqrt(norm.running_var + norm.eps)
    return inverse if norm.weight is None else norm.weight * inverse


def channel_shift(norm: Any, bias: Tensor | None = None) -> Tensor:
    """Return what a batch-norm adds to each channel behind its gain, shape ``(C,)``.

    Args:
        norm: The batch-norm, with running statistics.
        bias: What the layer in front adds, shape ``(C,)``.
    """
    mean = norm.running_mean if bias is None else norm.running_mean - bias
    shift = -mean * channel_gain(norm)
    return shift if norm.bias is None else shift + norm.bias


def channel_affine(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return ``x * gain + shift``, rounded twice, shape ``(N, C, ...)``.

    Args:
        x: Real values. Shape ``(N, C, ...)``.
        gain: Shape ``(C,)``.
        shift: Shape ``(C,)``.
    """
    shape = [1, -1] + [1] * (x.ndim - 2)
    return x * gain.view(shape) + shift.view(shape)


def stage_batch_norm(norm: nn.Module, *, synchronised: bool = False, fixed: bool = False) -> None:
    """Give batch-norm ``norm`` a stage, in place.

    Args:
        norm: A batch-norm of any rank.
        synchronised: Whether its statistics are taken over the batches of all ranks.
        fixed: Whether it never follows batches: it starts ``FROZEN`` instead of ``LIVE``.
    """
    stage = Stage.FROZEN if fixed else Stage.LIVE
    specialise(norm, StagedBatchNorm, stage=stage, synchronised=synchronised, fixed=fixed)


def restore_batch_norm(norm: StagedBatchNorm) -> None:
    """Undo ``stage_batch_norm``, in place."""
    generalise(norm, "stage", "synchronised", "fixed")


def batch_norms(model: nn.Module) -> list[StagedBatchNorm]:
    """Return every batch-norm that has a stage."""
    return [m for m in model.modules() if isinstance(m, StagedBatchNorm)]


def freeze_batch_norm(model: nn.Module) -> None:
    """Stop every batch-norm that is live from following its batches."""
    for norm in batch_norms(model):
        norm.stage = max(norm.stage, Stage.FROZEN)

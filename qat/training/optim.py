"""Parameter groups and learning rates: scales have a rate of their own, and clips a decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qat.fake_quant import decayed_scale_parameters, scale_parameters
from qat.kinds import FLAG, FRACTION, NULL, Kind, number, require_all, table, whole
from qat.layers import quantized_layers
from qat.training.schedule import Schedule

UP_TO = "up to "
"""What a rate begins with that is chosen by a probe: ``up to 0.02``."""
KINDS = {
    "lr": number(above=0),
    "qat_lr": number(above=0) | Kind("'up to 0.02'", lambda value: _ceiling(value) is not None),
    "scale_lr_ratio": number(0),
    "weight_decay": number(0),
    "warmup": FRACTION,
    "end_ratio": FRACTION,
    "clip_decay": number(0) | NULL,
    "decay_by_bits": table(whole(1, 16), number(0)) | NULL,
    "restart": FLAG,
}


@dataclass(frozen=True)
class Rates:
    """Learning rates and decay.

    Args:
        lr: Peak rate of the float part.
        qat_lr: First rate of the quantized part; or ``"up to 0.02"``, for the best of that rate and
            smaller ones, which a probe of a few steps finds.
        scale_lr_ratio: Rate of learned scales, relative to that of the weights.
        weight_decay: Decay of weights; biases, batch-norms and scales have none.
        warmup: Share of the float part over which the rate rises from 0.
        end_ratio: Where the cosine of the quantized part ends, relative to its start.
        clip_decay: Decay of learned clips, such as PACT's, which are scales otherwise; ``None``
            for that of the weights.
        decay_by_bits: Bits of a weight to what its decay is multiplied by; others keep theirs.
            Esser et al., arXiv:1902.08153, section 3: 1, 0.5 and 0.25 at 4, 3 and 2 bits.

        restart: The cosine of the quantized part starts anew wherever ``schedule.bits`` lowers.

    Raises:
        ConfigError: If a rate is not positive, a factor negative, or a value of another type.
    """

    lr: float = 0.1
    qat_lr: float | str = 0.01
    scale_lr_ratio: float = 1.0
    weight_decay: float = 1e-4
    warmup: float = 0.1
    end_ratio: float = 0.0
    clip_decay: float | None = None
    decay_by_bits: Mapping[int, float] | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        require_all("optimizer.rates.", vars(self), KINDS)

    @property
    def is_probed(self) -> bool:
        """Whether the rate of the quantized part is yet to be chosen."""
        return isinstance(self.qat_lr, str)

    @property
    def highest(self) -> float:
        """First rate of the quantized part, or the highest that may be chosen."""
        return float(str(self.qat_lr).removeprefix(UP_TO))


def _ceiling(value: object) -> float | None:
    """Return the number of a rate such as ``up to 0.02``, if it is one."""
    if not isinstance(value, str) or not value.startswith(UP_TO):
        return None
    try:
        rate = float(value.removeprefix(UP_TO))
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Split the parameters of ``model`` into weights, undecayed ones, scales and clips.

    Args:
        model: A prepared model; every parameter lands in exactly one group.
        rates: Learning rates and decay.
    """
    scales, clips = scale_parameters(model), decayed_scale_parameters(model)
    scale_ids, clip_ids = {id(p) for p in scales}, {id(p) for p in clips}
    rest = [p for p in model.parameters() if id(p) not in scale_ids]
    groups = [
        *_weight_groups(model, [p for p in rest if p.ndim > 1], rates),
        {
            "name": "undecayed",
            "params": [p for p in rest if p.ndim <= 1],
            "lr": rates.lr,
            "weight_decay": 0.0,
        },
        {
            "name": "scales",
            "params": [p for p in scales if id(p) not in clip_ids],
            "lr": rates.lr * rates.scale_lr_ratio,
            "weight_decay": 0.0,
        },
        {
            "name": "clips",
            "params": clips,
            "lr": rates.lr * rates.scale_lr_ratio,
            "weight_decay": rates.weight_decay if rates.clip_decay is None else rates.clip_decay,
        },
    ]
    return [g for g in groups if g["params"]]


def _weight_groups(
    model: nn.Module, weights: list[nn.Parameter], rates: Rates
) -> list[dict[str, Any]]:
    """One group for each width that ``rates.decay_by_bits`` names, and one for all others."""
    bits = {
        id(layer._parameters["weight"]): layer.weight_quant.quantizer.spec.bits
        for _, layer in quantized_layers(model)
    }
    factors = rates.decay_by_bits or {}
    names = {b: f"weights of {b} bits" for b in factors}
    groups: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "params": [],
            "lr": rates.lr,
            "weight_decay": rates.weight_decay * factors.get(b, 1.0),
        }
        for b, name in {**names, 0: "weights"}.items()
    }
    for weight in weights:
        groups[names.get(bits.get(id(weight), 0), "weights")]["params"].append(weight)
    return list(groups.values())


def rate_factor(step: int, total_steps: int, schedule: Schedule, rates: Rates) -> float:
    """Return the learning rate at ``step``, relative to ``rates.lr``.

    Warm-up and cosine over the float part, then a cosine from ``qat_lr`` over the quantized part.
    """
    start = schedule.start(total_steps)
    if step < start:
        warm = max(1, round(rates.warmup * start))
        if step < warm:
            return (step + 1) / warm
        return _cosine((step - warm) / max(1, start - warm))
    if rates.restart:
        starts = [*schedule.starts(total_steps), total_steps]
        start = max(s for s in starts[:-1] if s <= step)
        total_steps = min(s for s in starts if s > start)
    progress = (step - start) / max(1, total_steps - start)
    span = rates.end_ratio + (1 - rates.end_ratio) * _cosine(progress)
    return rates.highest / rates.lr * span


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_optimizer(
    model: nn.Module,
    factory: Callable[[Iterable[dict[str, Any]]], Optimizer],
    rates: Callable[[], Rates],
    schedule: Schedule,
    total_steps: int,
) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer and its schedule, which counts optimizer steps.

    Args:
        model: A prepared model.
        factory: Makes the optimizer from parameter groups.
        rates: Returns learning rates and decay as they are now: a probe may lower them later.
        schedule: The run's milestones.
        total_steps: Optimizer steps of the whole run.
    """
    optimizer = factory(parameter_groups(model, rates()))
    return optimizer, LambdaLR(
        optimizer, lambda step: rate_factor(step, total_steps, schedule, rates())
    )

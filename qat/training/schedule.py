"""When things happen: the milestones of a run, in fractions of it or in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from qat.errors import ConfigError
from qat.kinds import NULL, Kind, require_all, table, whole

MOMENT = Kind(
    "a fraction from 0.0 to 1.0 or a whole number of optimizer steps",
    lambda value: (
        value >= 0 if type(value) is int else isinstance(value, float) and 0 <= value <= 1
    ),
)
KINDS = {
    "float_epochs": whole(0),
    "epochs": whole(0),
    "calibrate": MOMENT,
    "activations": MOMENT | NULL,
    "freeze_observers": MOMENT,
    "freeze_batch_norm": MOMENT,
    "fold": MOMENT,
    "bits": table(whole(1, 16), MOMENT) | NULL,
}
ORDER = ("calibrate", "activations", "freeze_observers", "freeze_batch_norm", "fold")


@dataclass(frozen=True)
class Schedule:
    """Float epochs first, then the quantized part with its milestones.

    A milestone is a fraction of the quantized part (a float from 0 to 1) or a number of optimizer
    steps after its start (an integer).

    Args:
        float_epochs: Epochs of float training before anything is quantized.
        epochs: Epochs of the quantized part; 0 for post-training quantization: every milestone
            comes right behind the float epochs, and no quantized step is trained.
        calibrate: Observe ranges and quantize: weights, and activations unless those come later.
        activations: When activations follow; ``None`` for together with the weights.
        freeze_observers: From here scales stay as they are.
        freeze_batch_norm: From here batch-norms use their running statistics.
        fold: From here batch-norms are part of the weights, and biases are integers.
        bits: Bits to the milestone from which no site has fewer, fewer and fewer until each has
            its own; the first counts from the start. ``None``: their own from the start.

    Raises:
        ConfigError: If a value is out of range or the milestones are out of order.
    """

    float_epochs: int = 0
    epochs: int = 1
    calibrate: float | int = 0.0
    activations: float | int | None = None
    freeze_observers: float | int = 0.5
    freeze_batch_norm: float | int = 0.66
    fold: float | int = 0.85
    bits: Mapping[int, float | int] | None = None

    def __post_init__(self) -> None:
        require_all("schedule.", vars(self), KINDS)
        bits = dict(self.bits or {})
        if [*bits] != sorted(bits, reverse=True):
            raise ConfigError(
                f"expected schedule.bits from many bits to few, such as {{8: 0.0, 4: 0.3}}, got "
                f"{bits}: correct it."
            )
        named = {name: self.value(name) for name in ORDER}
        lowered = {f"bits.{b}": value for b, value in bits.items()}
        _check_order(named)
        _check_order({**lowered, "freeze_observers": self.freeze_observers})

    def check_length(self, total_steps: int) -> None:
        """Refuse milestones that a run of ``total_steps`` optimizer steps never comes to.

        Raises:
            ConfigError: If there is one.
        """
        length = total_steps - self.start(total_steps)
        lowered = {f"bits.{b}": value for b, value in (self.bits or {}).items()}
        for name, value in {**{n: self.value(n) for n in ORDER}, **lowered}.items():
            if self.epochs and type(value) is int and value > length:
                raise ConfigError(
                    f"expected schedule.{name} within the {length} optimizer steps of the "
                    f"quantized part, got {value}: lower it, or give a fraction such "
                    "as 0.85."
                )

    def value(self, name: str) -> float | int:
        """Return a milestone as it was given."""
        value = getattr(self, name)
        return self.calibrate if value is None else value

    def least_bits(self, step: int, total_steps: int) -> int | None:
        """Return the bits that every site has at least at optimizer step ``step``, if any."""
        bits = self.bits or {}
        begun = [b for b, value in bits.items() if self._step(value, total_steps) <= step]
        return min(begun, default=max(bits, default=None))

    def starts(self, total_steps: int) -> list[int]:
        """Return the optimizer steps at which the quantized part, or fewer bits, begin."""
        lowered = [self._step(value, total_steps) for value in (self.bits or {}).values()]
        return sorted({self.start(total_steps), *lowered})

    def start(self, total_steps: int) -> int:
        """Return the optimizer step at which the quantized part of ``total_steps`` starts."""
        return round(total_steps * self.float_epochs / max(1, self.float_epochs + self.epochs))

    def step(self, name: str, total_steps: int) -> int:
        """Return the optimizer step of milestone ``name`` in a run of ``total_steps``."""
        return self._step(self.value(name), total_steps)

    def _step(self, value: float | int, total_steps: int) -> int:
        start = self.start(total_steps)
        if isinstance(value, float):
            return start + round(value * (total_steps - start))
        return start + value


def _check_order(milestones: Mapping[str, float | int]) -> None:
    for (first, a), (second, b) in pairwise(milestones.items()):
        if type(a) is type(b) and a > b:
            raise ConfigError(
                f"expected schedule.{first} <= schedule.{second}, got {a} > {b}: "
                "a later milestone needs what an earlier one did."
            )

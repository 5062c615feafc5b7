"""FakeQuant: an observer, a quantizer and the phase they are in; and how to find them all."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError, SpecError
from qat.held import Holder
from qat.observers import OBSERVERS, MinMax
from qat.quantizers import QUANTIZERS, Quantizer
from qat.spec import QuantSpec


class Phase(enum.IntEnum):
    """What a fake-quant does with the tensors that pass."""

    FLOAT = 0
    """Lets them pass."""
    OBSERVE = 1
    """Lets them pass and, in training mode, looks at their range."""
    QUANTIZE = 2
    """Snaps them to the grid; in training the scale still moves."""
    FROZEN = 3
    """Snaps them to the grid; what the quantizer learns gets no gradient and stays."""


class FakeQuant(Holder):
    """Observe or fake-quantize the tensors of one site; the phase is part of the saved state.

    Args:
        site: The site's name, for messages.
        observer: Tells which range to cover.
        quantizer: Owns the scale and the arithmetic.
    """

    def __init__(self, site: str, observer: MinMax, quantizer: Quantizer) -> None:
        super().__init__()
        self.site = site
        self.observer = observer
        self.quantizer = quantizer
        self.phase = Phase.FLOAT
        self.calibrated = False
        self.own_bits = quantizer.spec.bits
        self._stopped: list[str] = []
        """Parameters of the quantizer that learn again when the phase is no longer ``FROZEN``."""

    @property
    def bits(self) -> int:
        """Width in use: more than ``own_bits`` for a time, where a schedule lowers it slowly."""
        return self.quantizer.spec.bits

    def use_bits(self, bits: int) -> None:
        """Change the width; the range of before means nothing then, so observe one anew.

        Raises:
            SpecError: If the quantizer does not have that width.
        """
        self.quantizer.use_bits(bits)
        self.observer.spec = self.quantizer.spec

    @property
    def spec(self) -> QuantSpec:
        """The number format of the site's codes."""
        return self.quantizer.code_spec

    @property
    def active(self) -> bool:
        """Whether tensors are snapped to the grid."""
        return self.phase >= Phase.QUANTIZE

    @property
    def is_static(self) -> bool:
        """Whether tensors are snapped to one grid, the same for all of them."""
        return self.active and not self.quantizer.is_dynamic

    @property
    def only_snaps(self) -> bool:
        """Whether, in training now, tensors are snapped to the grid and not looked at."""
        return self.training and self.active and not self._observes

    def forward(self, x: Tensor) -> Tensor:
        """Pass, observe or fake-quantize real values ``x``; shape of ``x``."""
        if self.training and self._observes:
            if not self.quantizer.has_batch:
                self.observer.reset()  # a weight comes whole: what it was before does not count
            self.observer.observe(x)
            if self.phase is Phase.QUANTIZE:
                self.quantizer.set_range(*self.observer.range())
        if self.training and self.phase in (Phase.OBSERVE, Phase.QUANTIZE):
            self.quantizer.follow(x)
        if self.phase is Phase.FROZEN:
            self._stop_learning()  # again, as a loop may have let all parameters of a model learn
        return self.quantizer(x) if self.active else x

    @property
    def _observes(self) -> bool:
        if self.phase is Phase.QUANTIZE:
            moves = not (self.quantizer.learns or self.quantizer.is_dynamic)
            return self.observer.follows and moves
        return self.phase is Phase.OBSERVE

    def set_phase(self, phase: Phase) -> None:
        """Enter ``phase``.

        Raises:
            CalibrationError: If it quantizes and no range was ever set.
        """
        if phase >= Phase.QUANTIZE and not self.calibrated:
            raise CalibrationError(
                f"expected site '{self.site}' to be calibrated before it quantizes, "
                "got no range: run the calibration first."
            )
        if phase is Phase.OBSERVE:
            self.observer.reset()
        self._enter(phase)

    def _enter(self, phase: Phase) -> None:
        """Stop the quantizer's parameters in ``FROZEN``: optimizers skip what has no gradient.

        Momentum and weight decay would move them even if their gradient were zero.
        """
        self.phase = phase
        if phase is Phase.FROZEN:
            self._stop_learning()
        else:
            for name in self._stopped:
                self.quantizer.get_parameter(name).requires_grad_(True)
            self._stopped = []

    def _stop_learning(self) -> None:
        for name, parameter in self.quantizer.named_parameters():
            if parameter.requires_grad:
                self._stopped.append(name)
                parameter.requires_grad_(False).grad = None

    def finish_calibration(self) -> None:
        """Copy the observed range into the quantizer.

        Raises:
            CalibrationError: If nothing, or nothing finite, was seen.
        """
        if self.observer.empty:
            raise CalibrationError(
                f"expected calibration data at site '{self.site}', got none: the site was never "
                "reached; calibrate with at least one batch that runs through it."
            )
        low, high = self.observer.range()
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise CalibrationError(
                f"expected finite values at site '{self.site}', got NaN or infinity: "
                "check the calibration data and the float model."
            )
        self.quantizer.set_range(low, high)
        self.calibrated = True

    def get_extra_state(self) -> Tensor:
        """Return phase, calibration flag, and bits where they are not its own, as a tensor."""
        bits = 0 if self.bits == self.own_bits else self.bits
        return torch.tensor([self.phase, self.calibrated, bits], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what ``get_extra_state`` gave."""
        phase, calibrated, *bits = state.tolist()  # checkpoints of older runs have no bits
        self._enter(Phase(phase))
        self.calibrated = bool(calibrated)
        wanted = (bits or [0])[0] or self.own_bits
        if wanted != self.bits:
            self.use_bits(wanted)

    def extra_repr(self) -> str:
        """Show site and phase in a module's print-out."""
        return f"{self.site}, {self.phase.name}"


def make_fake_quant(
    site: str,
    spec: QuantSpec,
    shape: tuple[int, ...],
    *,
    quantizer: str,
    observer: str,
    has_batch: bool,
    options: Mapping[str, Any] | None = None,
) -> FakeQuant:
    """Build the fake-quant of one site by the names of its parts.

    Args:
        site: The site's name.
        spec: The number format.
        shape: Shape of the tensor that will pass.
        quantizer: A name in ``QUANTIZERS``.
        observer: A name in ``OBSERVERS``.
        has_batch: Whether axis 0 counts samples (activations).
        options: What the quantizer takes beyond its format.

    Raises:
        SpecError: If a name is unknown, or the quantizer does not take format or options.
    """
    for name, table in ((quantizer, QUANTIZERS), (observer, OBSERVERS)):
        if name not in table:
            raise SpecError(
                f"expected one of {sorted(table)} at site '{site}', got {name!r}: correct it, or "
                "import the module that registers it (imports=[package.module])."
            )
    scale_shape, given = spec.scale_shape(shape), dict(options or {})
    try:
        made = QUANTIZERS[quantizer](spec, scale_shape, has_batch=has_batch, **given)
    except SpecError as error:
        raise SpecError(f"site '{site}': {error}") from None
    except TypeError as error:
        raise SpecError(
            f"expected options that quantizer '{quantizer}' takes at site '{site}', got {given} "
            f"({error}): correct or remove them."
        ) from error
    return FakeQuant(site, OBSERVERS[observer](spec, scale_shape), made)


def fake_quants(model: nn.Module) -> Iterator[FakeQuant]:
    """Yield every fake-quant of ``model``, each once, in the order of its modules."""
    return (m for m in model.modules() if isinstance(m, FakeQuant))


def weight_quants(model: nn.Module) -> list[FakeQuant]:
    """Return the fake-quants of weights."""
    return [f for f in fake_quants(model) if not f.quantizer.has_batch]


def activation_quants(model: nn.Module) -> list[FakeQuant]:
    """Return the fake-quants of activations."""
    return [f for f in fake_quants(model) if f.quantizer.has_batch]


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the learned scales of ``model``: no weight decay, a rate of their own."""
    return [p for f in fake_quants(model) for p in f.quantizer.parameters()]


def decayed_scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return those of ``scale_parameters`` whose quantizers want weight decay on them."""
    quantizers = [f.quantizer for f in fake_quants(model)]
    return [q.get_parameter(name) for q in quantizers for name in q.decayed]

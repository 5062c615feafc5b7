"""What quantizers on an integer grid have in common: how they round, and what its gradient is."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.functional.affine import Rounding, quantize
from qat.functional.estimators import dsq, ewgs
from qat.functional.fake_quantize import Estimator, fake_quantize
from qat.functional.fused import Grid, fused_fake_quantize, is_worth_it
from qat.functional.stochastic import round_stochastically
from qat.quantizers.base import Quantizer
from qat.spec import QuantSpec

ROUNDINGS = ("nearest", "stochastic", "floor")
GRADIENTS = ("ste", "ewgs", "dsq")
DELTA, SOFTNESS = 1e-3, 0.2


class GridQuantizer(Quantizer):
    """A quantizer whose codes are rounded quotients, with a choice of rounding and gradient.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        rounding: ``nearest``, half to even; ``stochastic``, in training mode alone: codes, and all
            that is evaluated or deployed, are nearest; ``floor``, also deployed, for weights.
        gradient: What ``x`` receives inside the grid: ``ste``, straight through; ``ewgs``, by the
            distance from its code, with ``delta`` 0.001; ``dsq``, by the slope of a staircase of
            softness 0.2.

    Raises:
        SpecError: If a word is unknown, or an activation is to be rounded by ``floor``.
    """

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        rounding: str = "nearest",
        gradient: str = "ste",
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        for name, word, known in (
            ("rounding", rounding, ROUNDINGS),
            ("gradient", gradient, GRADIENTS),
        ):
            if word not in known:
                raise SpecError(f"expected {name} to be one of {sorted(known)}, got {word!r}.")
        if rounding == "floor" and has_batch:
            raise SpecError(
                "expected rounding 'floor' on weights alone, got an activation: runtimes round "
                "activations to the nearest code; set it under weight."
            )
        self.rounding, self.gradient = rounding, gradient

    @property
    def estimator(self) -> Estimator | None:
        """The gradient of rounding, ``None`` for straight through."""
        if self.gradient == "ewgs":
            return ewgs(DELTA, self.spec.qmax - self.spec.qmin)
        return dsq(SOFTNESS) if self.gradient == "dsq" else None

    def snap(self, x: Tensor, scale: Tensor, zero_point: Tensor, factor: float = 1.0) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``.

        Args:
            x: Real values. Shape ``(...)``.
            scale: Grid spacing in use, real units.
            zero_point: Code of 0 in use; shape of ``scale``.
            factor: Multiplies the gradient of ``scale``.
        """
        rounding = self._deployed_rounding
        if self.rounding == "stochastic" and self.training:
            rounding = round_stochastically
        return fake_quantize(
            x,
            scale,
            zero_point,
            self.spec,
            factor=factor,
            estimate=self.estimator,
            rounding=rounding,
        )

    def grid_of(self, x: Tensor) -> Grid | None:
        """Return the grid, where nothing but ``snap`` is done, to the nearest code."""
        plain = self.estimator is None and self.rounding == "nearest"
        return self.fused_grid(x) if plain and type(self).forward is GridQuantizer.forward else None

    def fused_grid(self, x: Tensor) -> Grid:
        """Return the grid in use for real values ``x``."""
        scale, zero_point, factor = self.grid(x)
        return Grid(scale, zero_point, self.spec.qmin, self.spec.qmax, factor)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return scale, zero point and gradient factor in use for real values ``x``."""
        del x
        return self.scale, self.zero_point, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        grid = self.grid_of(x) if is_worth_it(x) else None
        y = None if grid is None else fused_fake_quantize(x, grid)
        return self.snap(x, *self.grid(x)) if y is None else y

    @property
    def _deployed_rounding(self) -> Rounding | None:
        return torch.floor if self.rounding == "floor" else None

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``."""
        ends = (self.spec.qmin, self.spec.qmax)
        return quantize(x, self.scale, self.zero_point, *ends, self._deployed_rounding)

"""What all quantizers without integers have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from qat.errors import SpecError
from qat.functional.affine import MIN_SCALE
from qat.functional.float_formats import FLOAT_FORMATS, FloatFormat
from qat.quantizers.base import Deployable
from qat.quantizers.scales import ObservedScale
from qat.spec import QuantSpec


class Simulated(ObservedScale):
    """Own a scale that an observer sets; what comes out are small floats, not codes.

    The format's sign bit is there also for unsigned formats, which just do not use it.

    Args:
        spec: ``bits`` is the width of the float format; symmetric, scales as they come.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        form: The float format of an element.

    Raises:
        SpecError: If the format is another one.
    """

    deployable = Deployable.SIMULATION
    widths = (4, 6, 8)
    """Bits that one of its float formats has."""
    needs = "symmetric formats, not power_of_two, with the bits of a float format: 4, 6 or 8"

    def __init__(
        self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool, form: FloatFormat
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        if spec.bits != form.bits:
            raise SpecError(
                f"expected bits={form.bits}, the width of the float format that "
                f"{type(self).__name__} is set to, got bits={spec.bits}: correct one of them."
            )
        self.form = form

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        fits = super().fits(spec, has_batch=has_batch)
        return fits and spec.bits in cls.widths and spec.symmetric and not spec.power_of_two

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Map the largest magnitude of ``low`` and ``high``, real units, to the largest number."""
        largest = torch.maximum(low.float().abs(), high.float().abs())
        self.set_scale((largest / self.form.largest).clamp_min(MIN_SCALE))

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Refuse: there are none.

        Args:
            x: Real values.

        Raises:
            SpecError: Always.
        """
        del x
        raise SpecError(
            f"expected a quantizer with integer codes, got {type(self).__name__} ({self.spec}), "
            "which simulates small floats: nothing but its float values can be had; choose a "
            "quantizer such as lsq for what is folded, converted or exported."
        )


def float_format(name: str, names: dict[str, str]) -> FloatFormat:
    """Look up the option ``format``.

    Args:
        name: What a recipe gives.
        names: What a quantizer takes, to names in ``FLOAT_FORMATS``.

    Raises:
        SpecError: If it is none of them.
    """
    if name not in names:
        raise SpecError(f"expected format among {sorted(names)}, got {name!r}: correct it.")
    return FLOAT_FORMATS[names[name]]

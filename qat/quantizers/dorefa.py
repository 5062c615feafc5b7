"""DoReFa: weights are squeezed by tanh between -1 and 1 and rounded to codes without a 0.

Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
Bitwidth Gradients", 2016, arXiv:1606.06160, section 2.3. Left out: gradients in few bits, and
1-bit weights, which the paper treats on their own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qat.functional.affine import MIN_SCALE, dequantize, expand, scale_from_range
from qat.functional.ste import replace_value
from qat.quantizers.base import Deployable
from qat.quantizers.scales import ObservedScale
from qat.spec import MAX_BITS, QuantSpec


def _largest(x: Tensor, shape: torch.Size) -> Tensor:
    """Return the largest entry of each block that shares one scale of ``shape``."""
    if not shape:
        return x.max()
    for axis, blocks in enumerate(shape):
        if blocks != x.shape[axis]:
            x = x.unflatten(axis, (blocks, -1)).amax(axis + 1)
    return x


class DoReFa(ObservedScale):
    """Fake-quantize weights to ``2 * round(n * N) / N - 1``, ``n = tanh(w) / (2 max) + 1/2``.

    ``max`` is the largest ``|tanh(w)|`` that shares the scale, ``N = 2**bits - 1``. The codes are
    odd numbers ``2 * round(n * N) - N`` and need one bit more than ``spec`` has; there is no 0
    among them, so pruned weights do not stay 0. Gradients go straight through the rounding and,
    as automatic differentiation has it, through tanh and max (shared equally by equal values).

    Args:
        spec: The number format: signed, symmetric.
        scale_shape: Shape of the scale.
        has_batch: False; activations are for another quantizer.

    Raises:
        SpecError: If the format is another one, or the site is an activation.

    Paper:
        Section 2.3. Differs: the result is multiplied by a constant that calibration sets, the
        largest weight that the observer saw, so that pretrained weights are a good start
        (``observer.weight=min_max``); also one scale, and one maximum, for each channel or group.
    """

    deployable = Deployable.TABLE
    needs = f"signed, symmetric weights of 2 to {MAX_BITS - 1} bits"

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        return not has_batch and spec.signed and spec.symmetric and 1 < spec.bits < MAX_BITS

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return the format of the odd codes: a bit more, symmetric around 0."""
        return replace(spec, bits=spec.bits + 1, narrow=True)

    @property
    def learns(self) -> bool:
        """True: weights learn; what an observer sees does not move the scale any more."""
        return True

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Copy in the scale whose ends cover ``low`` to ``high``, real units."""
        self.set_scale(scale_from_range(low, high, self.code_spec)[0])

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Return the integer codes of real values ``x`` as float32, shape of ``x``: odd ones."""
        top = self.code_spec.qmax
        steps = self._squeeze(x).mul_(0.5).add_(0.5).mul_(top).round_()
        return steps.mul_(2).sub_(top)

    def _squeeze(self, x: Tensor) -> Tensor:
        """Return ``tanh(x)`` divided by its largest magnitude, -1 to 1."""
        x = x.float().tanh()
        largest = _largest(x.abs(), self.observed_scale.shape).clamp_min(MIN_SCALE)
        return x / expand(largest, x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        spec, scale = self.code_spec, self.observed_scale
        values = dequantize(self.codes(x), scale, self.zero_point)
        surrogate = self._squeeze(x) * expand(scale * spec.qmax, x.shape)
        return replace_value(values if spec.bits > 8 else values.to(x.dtype), surrogate)

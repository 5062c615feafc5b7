"""APoT: levels are sums of powers of two, denser around 0, below a learned clipping threshold.

Source: Li et al., "Additive Powers-of-Two Quantization", ICLR 2020, arXiv:1909.13144; for odd
widths the terms of the authors' code, https://github.com/yhhhli/APoT_Quantization.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from qat.errors import SpecError
from qat.functional.affine import MIN_SCALE, expand, mean_to
from qat.functional.ste import clamp_min_ste, power_of_two
from qat.quantizers.table import TableQuantizer
from qat.spec import QuantSpec

TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0, 1),),
    2: ((0, 1, 2, 4),),
    3: ((0, 1, 4, 8), (0, 2)),
    4: ((0, 2, 8, 32), (0, 1, 4, 16)),
    5: ((0, 2, 16, 64), (0, 1, 8, 32), (0, 4)),
    6: ((0, 4, 32, 256), (0, 2, 16, 128), (0, 1, 8, 64)),
}
"""Width without sign → what a level is summed from, in units of the smallest power of two."""


class APoT(TableQuantizer):
    """Clip at a learned threshold and project on sums of powers of two.

    A code counts the smallest of those powers, so codes are wider than ``spec``: signed formats of
    2 to 6 bits have codes of 2, 4, 5, 7 and 8 bits, unsigned ones of 3, 4, 6, 7 and 9.

    Args:
        spec: The number format: 2 to 6 bits, symmetric.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        normalise: Subtract the mean of a weight and count the threshold in its standard deviations;
            both follow the weight, without a gradient, until scales are frozen.

    Raises:
        SpecError: If the format is another one, or ``normalise`` is for an activation.

    Paper:
        Levels: section 2.2; gradient of the threshold: section 2.3 (RCF), without a factor; weight
        normalisation: section 2.4. Differs: normalised weights are multiplied by their standard
        deviation again, so that a float model keeps its function; that needs no batch-norm behind
        the layer. For the same reason normalisation is off by default. The threshold starts where
        calibration puts it, not at 3 and 8, and may be one for each channel or group. Clipped
        weights get no gradient; in the authors' code they do. A tie goes to the higher level.
    """

    needs = "symmetric formats of 2 to 6 bits"
    widths = (range(2, 7), range(2, 7))
    """Of unsigned formats, and of signed ones."""
    mean: Tensor
    deviation: Tensor
    thresholds: Tensor
    levels: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        normalise: bool = False,
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        if normalise and has_batch:
            raise SpecError(
                "expected normalise=true on weights alone, got it on an activation: "
                "remove the option from the rule for activations."
            )
        self.normalise = normalise
        self.learned_clip = nn.Parameter(torch.ones(scale_shape))
        self.register_buffer("mean", torch.zeros(scale_shape))
        self.register_buffer("deviation", torch.ones(scale_shape))
        positive = torch.tensor(self.magnitudes(spec), dtype=torch.float32)
        levels = torch.cat([-positive[1:].flip(0), positive]) if spec.signed else positive
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("thresholds", (levels[1:] + levels[:-1]) / 2, persistent=False)

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        del has_batch
        return spec.symmetric and spec.bits in cls.widths[spec.signed]

    @classmethod
    def magnitudes(cls, spec: QuantSpec) -> list[int]:
        """Return the codes of ``spec`` that are not negative, ascending."""
        return sorted(map(sum, product(*TERMS[spec.bits - spec.signed])))

    @classmethod
    def code_format(cls, spec: QuantSpec) -> QuantSpec:
        """Return the narrowest format that holds the codes; a signed one is symmetric."""
        bits = cls.magnitudes(spec)[-1].bit_length() + spec.signed
        return replace(spec, bits=bits, narrow=spec.signed)

    @property
    def scale(self) -> Tensor:
        """The real value of the smallest power of two, positive; differentiable."""
        scale = clamp_min_ste(
            self.learned_clip * self.deviation.clone() / self.levels[-1], MIN_SCALE
        )
        return power_of_two(scale) if self.spec.power_of_two else scale

    @property
    def learns(self) -> bool:
        """True: gradients move the threshold."""
        return True

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Copy positive ``scale`` values in, in place."""
        self.learned_clip.copy_(scale * self.levels[-1] / self.deviation)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Put the threshold where it covers ``low`` to ``high``, real units."""
        low, high = low - self.mean, high - self.mean
        reach = torch.maximum(-low, high) if self.spec.signed else high
        self.set_scale(reach / self.levels[-1])

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Take mean and standard deviation from the weight ``x``."""
        if self.normalise:
            x, shape = x.detach().float(), self.mean.shape
            self.mean.copy_(mean_to(x, shape))
            centred = x - expand(self.mean, x.shape)
            self.deviation.copy_(mean_to(centred.square(), shape).sqrt().clamp_min(MIN_SCALE))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return ascending thresholds ``(n,)``, in steps, and integer codes ``(n + 1,)``."""
        return self.thresholds, self.levels

    def steps(self, x: Tensor) -> Tensor:
        """Return real values ``x`` without their mean, in units of the scale, float32."""
        return (x.float() - expand(self.mean, x.shape)) / expand(self.scale, x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        codes = self.codes(x)
        return self.snap(x, codes, self.clipped(x, codes))

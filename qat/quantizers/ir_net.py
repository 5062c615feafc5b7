"""IR-Net: balanced binary weights at powers of two, and a gradient that sharpens into a sign's.

Source: Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural
Networks", CVPR 2020, arXiv:1909.10788.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.affine import MIN_SCALE, expand, mean_to
from qat.functional.ste import power_of_two
from qat.quantizers.binary import Binary
from qat.spec import QuantSpec

FIRST, LAST = 0.1, 10.0


class IRNet(Binary):
    """Give ``sign(w - mean)`` times a power of two; an activation its sign, or 0 and 1.

    Mean, standard deviation and scale of a weight follow it until scales are frozen.

    Args:
        spec: The number format: 1 bit, symmetric; of a weight signed.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.

    Raises:
        SpecError: If the format is another one.

    Paper:
        Section 3.2 (Libra parameter binarization): codes of ``(w - mean) / std``, and a power of
        two near their mean magnitude. Section 3.3 (error decay estimator): the gradient of a sign
        is ``k * t * (1 - tanh(t * v)**2)`` with ``t`` from 0.1 to 10, evenly in its logarithm, and
        ``k = max(1 / t, 1)``. Differs: the scale is in the units of the weight, not of the weight
        divided by ``std``, so that a float model keeps its function; mean and std get no gradient;
        an activation has a learned scale, in whose units ``v`` is, and whose gradient is the code;
        without a sign ``v`` counts from one half, in halves.
    """

    mean: Tensor
    deviation: Tensor
    sharpness: Tensor

    def __init__(self, spec: QuantSpec, scale_shape: tuple[int, ...], *, has_batch: bool) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        self.register_buffer("mean", torch.zeros(scale_shape))
        self.register_buffer("deviation", torch.ones(scale_shape))
        self.register_buffer("sharpness", torch.tensor(FIRST))

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """Take mean, standard deviation and scale of a weight from its real values ``x``."""
        if self.has_batch:
            return
        shape = self.mean.shape
        self.mean.copy_(mean_to(x.detach().float(), shape))
        centred = x.detach().float() - expand(self.mean, x.shape)
        self.deviation.copy_(mean_to(centred.square(), shape).sqrt().clamp_min(MIN_SCALE))
        self.set_scale(power_of_two(mean_to(centred.abs(), shape).clamp_min(MIN_SCALE)))

    def anneal(self, progress: float) -> None:
        """Sharpen the gradient.

        Args:
            progress: Share of the quantized part of the run that is done, 0 to 1.
        """
        self.sharpness.fill_(FIRST * (LAST / FIRST) ** progress)

    def steps(self, x: Tensor) -> Tensor:
        """Return a weight ``x`` without its mean, in standard deviations; else in scales."""
        unit = self.scale.detach() if self.has_batch else self.deviation.clone()
        return (x.float() - expand(self.mean.clone(), x.shape)) / expand(unit, x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        codes, scale = self.codes(x), expand(self.scale, x.shape)
        return self.snap(x, codes, scale * codes + scale.detach() * self.soft(self.steps(x)))

    def soft(self, steps: Tensor) -> Tensor:
        """Return what has the estimator's gradient: a smooth step from code to code.

        Args:
            steps: What ``steps`` gave. Shape ``(...)``.
        """
        half, sharpness = (self.levels[1] - self.levels[0]) / 2, self.sharpness.clone()
        signed = (steps - self.thresholds) / half
        return half * (1 / sharpness).clamp_min(1) * torch.tanh(sharpness * signed)

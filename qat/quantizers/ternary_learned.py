"""Learned ternary weights: small ones are 0, all others have one magnitude that is trained.

Source: Zhu et al., "Trained Ternary Quantization", ICLR 2017, arXiv:1612.01064.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qat.functional.affine import expand, reduce_to
from qat.functional.ste import replace_value
from qat.quantizers.scales import LearnedScale
from qat.quantizers.ternary import Ternary


class TernaryLearned(LearnedScale, Ternary):
    """Give ``sign(w)`` times a learned scale where ``|w|`` is above a cutoff, else 0.

    The cutoff is 0.05 times the largest magnitude, and follows the weight until scales are frozen.
    The scale starts at the mean magnitude of what lies above it.

    Args:
        spec: The number format: 2 bits, signed, symmetric.
        scale_shape: Shape of the scale.
        has_batch: False; activations do not come whole.

    Raises:
        SpecError: If the format is another one, or the site is an activation.

    Paper:
        Section 3: the cutoff, and the gradient of a scale, the sum of those of the weights that
        have it. Differs: one scale for positive and negative weights, as integers need it, so the
        gradients of the negative ones count with their sign changed; every weight has gradient 1,
        where the paper multiplies by the scale, because weights are not normalised to 1 here; also
        one scale for each channel or group.
    """

    share = 0.05

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Start the scale at the mean magnitude above the cutoff."""
        del low, high
        self.learned_scale.copy_(self.observed_scale)

    def size(self, magnitudes: Tensor) -> Tensor:
        """Return what the cutoff is a share of, shape of the scale."""
        return reduce_to(magnitudes, self.cutoff.shape, torch.amax)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize real values ``x``; shape and dtype of ``x``."""
        trained = expand(self.scale, x.shape) * self.codes(x)
        return replace_value(super().forward(x).detach(), x + trained.to(x.dtype))

"""LSQ: the scale is a parameter, trained with the weights.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv:1902.08153.
Left out: a learned offset (that is LSQ+); an affine zero point stays where calibration put it.
"""

from __future__ import annotations

from torch import Tensor

from qat.errors import SpecError
from qat.functional.fused import Grid
from qat.quantizers.grid import GridQuantizer
from qat.quantizers.scales import LearnedScale
from qat.spec import QuantSpec

SCALE_FACTORS = ("paper", "elements", "none")


class LSQ(LearnedScale, GridQuantizer):
    """Fake-quantize with a learned scale; its gradient is multiplied by ``1 / sqrt(n * qmax)``.

    ``n`` counts the elements that share one scale: of a weight, all of them; of an activation,
    those of one sample (the paper's features of a layer), so that batch size and the number of
    processes change nothing.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        rounding: As in ``GridQuantizer``; the paper's is ``nearest``.
        gradient: As in ``GridQuantizer``; the paper's is ``ste``.
        scale_factor: What multiplies the gradient of the scale: ``"paper"``,
            ``1 / sqrt(n * qmax)``; ``"elements"``, ``1 / sqrt(n)``; or ``"none"``, 1.

    Raises:
        SpecError: If an option is another word.

    Paper:
        Gradient: eq. 3; its factor: section 2.2. The initial scale ``2 * mean(|x|) / sqrt(qmax)``
        is the observer ``mean_magnitude``. Differs: also one scale per channel or group; the
        scale is held above a small positive bound, which the paper leaves open.
    """

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        rounding: str = "nearest",
        gradient: str = "ste",
        scale_factor: str = "paper",
    ) -> None:
        super().__init__(
            spec, scale_shape, has_batch=has_batch, rounding=rounding, gradient=gradient
        )
        if scale_factor not in SCALE_FACTORS:
            raise SpecError(
                f"expected scale_factor to be one of {', '.join(SCALE_FACTORS)}, got "
                f"{scale_factor!r}: correct the option."
            )
        self.scale_factor = scale_factor

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return scale, zero point and gradient factor in use for real values ``x``."""
        return self.scale, self.zero_point, self.gradient_factor(x)

    def fused_grid(self, x: Tensor) -> Grid:
        """Return the grid in use for real values ``x``; gradients go straight to the parameter."""
        ends, factor = (self.spec.qmin, self.spec.qmax), self.gradient_factor(x)
        return Grid(self.held_scale, self.zero_point, *ends, factor, learned=self.learned_scale)

    def gradient_factor(self, x: Tensor) -> float:
        """Return what the gradient of the scale is multiplied by for real values ``x``."""
        if self.scale_factor == "none":
            return 1.0
        shared = x.numel() / self.learned_scale.numel() / (x.shape[0] if self.has_batch else 1)
        steps = self.spec.qmax if self.scale_factor == "paper" else 1
        return (max(shared, 1.0) * steps) ** -0.5

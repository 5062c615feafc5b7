"""EWGS: the gradient of a value depends on how far it lies from its code.

Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling", CVPR 2021,
arXiv:2104.00903, section 3.
"""

from __future__ import annotations

from qat.errors import SpecError
from qat.functional.estimators import ewgs
from qat.functional.fake_quantize import Estimator
from qat.kinds import number, require
from qat.quantizers.lsq import LSQ
from qat.spec import QuantSpec


class EWGS(LSQ):
    """Fake-quantize with LSQ's learned scale, and gradients of ``x`` that are scaled by element.

    Inside the grid ``x`` receives ``g * (1 + delta * sign(g) * (x_n - x_q))``, outside nothing.

    Args:
        spec: The number format.
        scale_shape: Shape of the scale.
        has_batch: Whether axis 0 of what it sees counts samples.
        delta: How much the distance from the code counts; it is 1 from end to end of the grid.

    Raises:
        SpecError: If ``delta`` is negative.

    Paper:
        Section 3. Differs: the grid has one learned scale and a code 0, as LSQ's; the paper learns
        both ends of an interval and, behind a layer, the scale of its output. ``delta`` stays what
        it is; the paper also adapts it to the trace of the loss's Hessian.
    """

    def __init__(
        self,
        spec: QuantSpec,
        scale_shape: tuple[int, ...],
        *,
        has_batch: bool,
        delta: float = 1e-3,
    ) -> None:
        super().__init__(spec, scale_shape, has_batch=has_batch)
        require("delta of EWGS", delta, number(0), SpecError)
        self.delta = delta

    @property
    def estimator(self) -> Estimator:
        """The gradient of rounding."""
        return ewgs(self.delta, self.spec.qmax - self.spec.qmin)

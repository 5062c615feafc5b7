"""Dynamic per tensor: every batch brings one scale and one zero point, as it passes.

Source: DynamicQuantizeLinear of ONNX, https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html;
what onnxruntime's ``quantize_dynamic`` and PyTorch's ``quantize_dynamic`` give linear layers.
"""

from __future__ import annotations

from torch import Tensor

from qat.functional.dynamic import tensor_grid
from qat.quantizers.dynamic import Dynamic
from qat.spec import QuantSpec


class DynamicTensor(Dynamic):
    """Fake-quantize a whole tensor on the grid that just covers it and 0; gradient 1 everywhere.

    The samples of a batch share the grid, so what is predicted for one depends on the others.

    Args:
        spec: The number format: 8 bits, unsigned, affine, as the operator of ONNX has it.
        scale_shape: Shape of the calibrated scale, ``()``.
        has_batch: True; weights do not change from input to input.

    Raises:
        SpecError: If the format is another one, or the site is a weight.
    """

    needs = "activations with bits: 8, signed: false, symmetric: false"

    @classmethod
    def fits(cls, spec: QuantSpec, *, has_batch: bool) -> bool:
        """Whether the quantizer has the format ``spec``, for activations or for weights."""
        return has_batch and spec == QuantSpec(8, signed=False, symmetric=False)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale, real units, and zero point that ``x`` brings; both ``()``.

        Args:
            x: Real values, float32. Shape ``(...)``.
        """
        return tensor_grid(x, self.spec.qmax)

"""The integer reference as a chip without floats runs it: fixed-point multipliers and tables.

Between the quantize of the inputs and the logits only integers are computed with, at any width from
2 to 16 bits. What the plan leaves in float, or has no integer form, runs on real values between a
dequantize and a quantize, and is listed in ``float_ops``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.batch_norm import StagedBatchNorm, channel_gain, channel_shift
from qat.codecs import ActivationCodec
from qat.integer_layers import ChannelAffine
from qat.reference.fixed_point import fixed_point_codes
from qat.reference.functions import TABLE_BITS, Lookup, Shares
from qat.reference.run import IntegerRun, Quantize
from qat.reference.values import Accumulator, Affine, BroughtGrid, Codes, Pending

_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_WHOLE = 1e-6  # sums of windows with fewer elements are off by a fraction of their number
TABULATED = ("sigmoid", "hardsigmoid", "tanh", "silu", "gelu", "hardswish")


class ChipRun(IntegerRun):
    """A model that runs without floats; made and called like ``IntegerRun``."""

    kernel_bits = 16

    def _on_integers(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        result = super()._on_integers(n, args, kwargs)
        if isinstance(self._module(n), Quantize) and _brings_grid(result):
            self.float_ops[n.name] = "quantize_dynamic"  # its scale is a division
        if result is None and args and isinstance(args[0], Codes):
            return self._on_codes(n, args, kwargs)
        return result

    def _quantize(self, module: Quantize, x: Any) -> Codes | None:
        if isinstance(x, Codes) and not isinstance(x.grid, BroughtGrid):
            x = Accumulator(x.steps, x.grid.scale)  # codes on another grid: rescaled as sums are
        return super()._quantize(module, x)

    def _on_codes(self, n: fx.Node, args: Any, kwargs: Any) -> Pending | None:
        module, name, x = self._module(n), self._name(n), args[0]
        if isinstance(module, ChannelAffine):
            return _affine(x, module.gain, module.shift)
        if isinstance(module, StagedBatchNorm):
            return _affine(x, channel_gain(module), channel_shift(module))
        if x.grid.spec.bits > TABLE_BITS:
            return None
        if name == "softmax":
            dim = _option("dim", module, args, kwargs)
            return None if dim is None else Shares(x, dim)
        if name in TABULATED:
            return Lookup(x, lambda v: self._call(n, (v, *args[1:]), kwargs, _same))
        return None

    def _windows(self, n: fx.Node, args: Any, kwargs: Any, mean: Tensor) -> Pending | None:
        """Average windows as integer sums, where all count the same number of elements."""
        x = args[0]
        kernel = _kernel(n, self._module(n), args, kwargs, rank=x.steps.ndim - 2)
        size = math.prod(kernel) if kernel else x.steps.numel() // max(mean.numel(), 1)
        sums = mean * size
        whole = mean.numel() > 0 and bool((sums - sums.round()).abs().max() < _WHOLE)
        return Accumulator(sums.round(), x.grid.scale, size) if whole else None

    def _round(self, x: Pending, grid: ActivationCodec) -> Tensor:
        return fixed_point_codes(x, grid)


def _brings_grid(value: Any) -> bool:
    return isinstance(value, Codes) and isinstance(value.grid, BroughtGrid)


def _affine(x: Codes, gain: Tensor, shift: Tensor) -> Affine:
    shape = [1, -1] + [1] * (x.steps.ndim - 2)
    return Affine(x.steps, (gain * x.grid.scale).view(shape), shift.view(shape))


def _same(value: Any) -> Any:
    return value


def _option(name: str, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Return an option of a module, or of a function that takes it behind its input."""
    if module is not None:
        return getattr(module, name, None)
    return kwargs.get(name, args[1] if len(args) > 1 else None)


def _kernel(
    n: fx.Node, module: nn.Module | None, args: Any, kwargs: Any, *, rank: int
) -> tuple[int, ...]:
    """Return the window of a pool, empty where the sizes of input and output give it."""
    if module is None and n.target not in _POOLS:
        return ()
    kernel = _option("kernel_size", module, args, kwargs) or ()
    return (kernel,) * rank if isinstance(kernel, int) else tuple(kernel)

"""The layers inside a module that runs whole: each multiplies codes, though no graph calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from qat.integer_layers import IntegerLayer
from qat.layers import QuantizedLayer
from qat.reference.kernels import accumulate, has_integer_kernel
from qat.reference.values import BroughtGrid, Codes

Quantize = Callable[[Any, Tensor], Codes | None]


@contextmanager
def integer_layers(module: nn.Module | None, quantize: Quantize, bits: int) -> Iterator[None]:
    """Let the layers inside ``module`` that quantize their own input compute on integers.

    Args:
        module: A module that runs whole, or ``None`` for none.
        quantize: Returns the codes of a layer's input, ``None`` if it has no single grid.
        bits: The widest codes that there are integer kernels for.
    """
    layers = [] if module is None else [m for m in module.modules() if m is not module]
    with ExitStack() as stack:
        for layer in layers:
            source = _source(layer)
            if source is not None:
                forward = _forward(layer, source, quantize, bits)
                stack.enter_context(patch.object(layer, "forward", forward))
        yield


def _source(layer: nn.Module) -> nn.Module | None:
    """Return what quantizes the input of ``layer`` inside of it."""
    if isinstance(layer, QuantizedLayer):
        return layer.links.input_quant if layer.links.inner else None
    return layer._modules.get("input_codec") if isinstance(layer, IntegerLayer) else None


def _forward(layer: nn.Module, source: nn.Module, quantize: Quantize, bits: int) -> Any:
    in_float = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        lookups, quant = (
            (source[:-1], source[-1]) if isinstance(source, nn.Sequential) else ((), source)
        )
        for lookup in lookups:
            x = lookup(x)
        codes = quantize(quant, x)
        if codes is None or args or kwargs or not _fits(layer, codes, bits):
            return in_float(x, *args, **kwargs)
        return accumulate(layer, codes).real()

    return forward


def _fits(layer: nn.Module, codes: Codes, bits: int) -> bool:
    is_linear = isinstance(layer, nn.Linear)
    static = not isinstance(codes.grid, BroughtGrid)
    return (static or is_linear) and has_integer_kernel(layer, codes, bits)

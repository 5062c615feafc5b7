"""What is compiled in training: nothing, fake-quantization alone, or the whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from qat.errors import ConfigError
from qat.functional.fused import fused_kernels
from qat.functional.kept import kept_as_codes
from qat.graph.captured import Captured
from qat.graph.training import training_graph

MOST_GRAPHS = 64
"""Of one compiled step: phases, shapes; torch keeps fewer by default, and then none is used."""

CompileMode = Literal["off", "regional", "step"]


def training_forward(model: nn.Module, mode: CompileMode) -> Callable[..., Any]:
    """Return what computes the outputs of ``model`` in a training step.

    A compiled step computes the same numbers in another order, so that sums differ in their last
    bits, and a value at a tie may take the code beside.

    Args:
        model: A prepared model; it is not changed.
        mode: ``"off"`` runs it as it is; ``"regional"`` with fused fake-quantization, compiled once
            in seconds and kept on disk; ``"step"`` compiles all of it when it is first called, and
            again in every phase, about a minute for a ResNet-20 on two cores.

    Raises:
        ConfigError: If the mode is another word.
    """
    if mode == "off":
        return model.__call__
    if mode == "regional":
        return _regional(model)
    if mode != "step":
        raise ConfigError(
            f"expected compile=off, compile=regional or compile=step, got {mode!r}: correct it."
        )
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    return torch.compile(model.forward, dynamic=False)


def _regional(model: nn.Module) -> Callable[..., Any]:
    """Return the forward of training with fused kernels, which keeps codes for the backward."""
    captured = model if isinstance(model, Captured) else None
    fused = None if captured is None else training_graph(captured)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with fused_kernels(), kept_as_codes():
            if captured is None or not model.training:
                return model(*args, **kwargs)
            return captured.call(fused, *args, **kwargs)

    return forward

"""What a training step runs: as it is, fused or compiled; and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from qat.errors import ConfigError
from qat.functional.fused import fused_kernels
from qat.functional.kept import kept_as_codes
from qat.graph.captured import Captured, make_function
from qat.graph.checkpointing import checkpointed
from qat.graph.training import training_graph

MOST_GRAPHS = 64
"""Of one compiled step: phases, shapes; torch keeps fewer by default, and then none is used."""

CompileMode = Literal["off", "regional", "step"]
Checkpointing = Literal["off", "auto"] | int


def training_forward(
    model: nn.Module, mode: CompileMode, checkpointing: Checkpointing = "off"
) -> Callable[..., Any]:
    """Return what computes the outputs of ``model`` in a training step.

    A compiled step computes the same numbers in another order, so that sums differ in their last
    bits, and a value at a tie may take the code beside. With checkpointing every bit is the same.

    Args:
        model: A prepared model; it is not changed. One that was not captured has no segments.
        mode: ``"off"`` runs it as it is; ``"regional"`` with fused fake-quantization, compiled once
            in seconds and kept on disk; ``"step"`` compiles all of it when it is first called, and
            again in every phase, about a minute for a ResNet-20 on two cores.
        checkpointing: ``"off"`` keeps what the backward reads; a number of segments, or ``"auto"``
            for the square root of the number of operations, computes it again.

    Raises:
        ConfigError: If one of them is another word, or they do not go together.
    """
    if mode not in ("off", "regional", "step"):
        raise ConfigError(
            f"expected compile=off, compile=regional or compile=step, got {mode!r}: correct it."
        )
    if checkpointing != "off":
        _check(checkpointing, mode)
    if mode == "step":
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        return torch.compile(model.forward, dynamic=False)
    captured = model if isinstance(model, Captured) else None
    if captured is None or (mode, checkpointing) == ("off", "off"):
        return _in_context(model, mode)
    return _in_context(model, mode, _function(captured, mode, checkpointing))


def _check(checkpointing: Checkpointing, mode: CompileMode) -> None:
    is_count = type(checkpointing) is int and checkpointing >= 2
    if checkpointing != "auto" and not is_count:
        raise ConfigError(
            "expected checkpointing=off, checkpointing=auto or a number of segments from 2 on, got "
            f"{checkpointing!r}: correct it; a YAML file has 'off' in quotes."
        )
    if mode == "step":
        raise ConfigError(
            f"expected checkpointing=off with compile=step, got {checkpointing!r}: a step compiled "
            "as one graph chooses by itself what it computes again; set compile=regional."
        )


def _function(
    model: Captured, mode: CompileMode, checkpointing: Checkpointing
) -> Callable[..., Any]:
    """Return what takes the place of the model's own graph in training."""
    graph = training_graph(model) if mode == "regional" else model.graphs["train"]
    if checkpointing == "off":
        return make_function(graph)
    count = None if checkpointing == "auto" else checkpointing
    return checkpointed(model, graph, count, fused_kernels if mode == "regional" else nullcontext)


def _in_context(
    model: nn.Module, mode: CompileMode, function: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Return the forward of training; fused kernels come with codes kept for the backward."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as contexts:
            if mode == "regional":
                contexts.enter_context(fused_kernels())
                contexts.enter_context(kept_as_codes())
            if isinstance(model, Captured) and model.training and function is not None:
                return model.call(function, *args, **kwargs)
            return model(*args, **kwargs)

    return forward

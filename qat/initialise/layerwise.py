"""Layer by layer: in which order layers run, and what one of them reads and returns.

Models run in evaluation mode and full precision, without gradients, and only as far as the layer
that is looked at, so that a model can be changed in front of it and looked at again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qat.calls import on_batch
from qat.graph.captured import Captured
from qat.layers import QuantizedLayer, quantized_layers
from qat.subclass import plain_twin

Look = Callable[[Tensor, Tensor], None]
"""Takes what one call of a layer reads and returns."""


class _ReachedError(Exception):
    """The layer has run; what lies behind it need not."""


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in evaluation mode, without gradients and autocast; its mode comes back.

    Args:
        model: A model with parameters.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        model.train(was_training)


def count_calls(model: Captured, batch: Any) -> Counter[str]:
    """Return how often each module runs for one batch, in the order in which they first end.

    Args:
        model: A prepared model.
        batch: Inputs ``(N, ...)``, or a call.
    """
    calls: Counter[str] = Counter()
    names = {id(module): name for name, module in model.named_modules() if name}
    hooks = [
        module.register_forward_hook(lambda module, *_: calls.update([names[id(module)]]))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with evaluation(model):
            on_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def layers_in_order(model: Captured, calls: Counter[str]) -> dict[str, QuantizedLayer]:
    """Return the quantized layers that run, by name, in order of their first call.

    Args:
        model: A prepared model.
        calls: What ``count_calls`` returned.
    """
    layers = dict(quantized_layers(model))
    return {name: layers[name] for name in calls if name in layers}


def is_shared(model: Captured, parameter: Tensor, calls: Counter[str]) -> bool:
    """Whether several modules that run hold ``parameter``, so that one cannot change it alone.

    Args:
        model: A prepared model.
        parameter: A weight or bias of one of its layers.
        calls: What ``count_calls`` returned.
    """
    holders = [
        name
        for name in calls
        if any(p is parameter for p in model.get_submodule(name)._parameters.values())
    ]
    return len(holders) > 1


def look_at(
    model: Captured, name: str, batches: Sequence[Any], look: Look, *, calls: int = 1
) -> None:
    """Show every call of a layer to ``look``, and run nothing behind the last one.

    Args:
        model: A prepared model.
        name: Of the layer.
        batches: Inputs ``(N, ...)``, or calls.
        look: Takes input and output of a call.
        calls: How often the layer runs for one batch.
    """
    seen = 0

    def hook(_layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        nonlocal seen
        look(args[0] if args else kwargs["input"], y)
        seen += 1
        if seen % calls == 0:
            raise _ReachedError

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        with evaluation(model):
            for batch in batches:
                with suppress(_ReachedError):
                    on_batch(model, batch)
    finally:
        handle.remove()


def output_with(layer: QuantizedLayer, weight: Tensor, x: Tensor) -> Tensor:
    """Return what ``layer`` would make of ``x`` with another weight, no hook of it called.

    Args:
        layer: The layer; it is not changed.
        weight: Real values, shape of its weight.
        x: What it reads, ``(N, ...)``.
    """
    return plain_twin(layer, **{**layer._parameters, "weight": weight}).forward(x)


def output_axis(layer: nn.Module, output: Tensor) -> int:
    """Return the axis on which ``output`` of ``layer`` has its channels.

    Args:
        layer: A convolution, or a layer whose channels come last.
        output: What it returned, ``(N, C, ...)`` of a convolution, else ``(N, ..., C)``.
    """
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else output.ndim - 1

"""Multiply-accumulates, counted by the operators that run, whatever module or function calls them.

torch's own formulas (``torch.utils.flop_counter``) know matrix products, convolutions and some
kernels of attention; the table here adds what runs as one operator elsewhere. An operator without
a formula is looked into, and counts nothing where it is not made of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

_DEVICE = torch.ops.prim.device.default  # says where a fake tensor would be
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _recurrent(x: Tensor, of_input: Tensor, of_state: Tensor, *_: Any, **__: Any) -> int:
    return x.numel() // x.shape[-1] * (of_input.numel() + of_state.numel())


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent_on_gpu(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return x.numel() // x.shape[-1] * sum(w.numel() for w in weights if w.ndim > 1)


def _self_attention(query: Tensor, *others: Any, **__: Any) -> int:
    return _fused(query, others[4], others[6])


def _encoder_layer(x: Tensor, *others: Any, **__: Any) -> int:
    return _fused(x, *(others[i] for i in (2, 4, 13, 15)))


def _fused(x: Tensor, *weights: Tensor) -> int:
    """Attention of a sequence ``(N, L, E)`` to itself, and layers with ``weights``."""
    products = sum(w.numel() for w in weights) + 2 * x.shape[1] * x.shape[2]
    return x.shape[0] * x.shape[1] * products


def _bilinear(a: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return a.shape[0] * weight.numel()


def _distances(a: Tensor, b: Tensor, p: float, *_: Any, result: Tensor, **__: Any) -> int:
    del b
    return result.numel() * a.shape[-1] if p == 2 else 0


def _sampled(x: Tensor, weight: Tensor, *_: Any, result: Tensor, **__: Any) -> int:
    del x
    return result.numel() * weight[0].numel()


def _rows(matrix: Tensor, *_: Any, result: Tensor, **__: Any) -> int:
    """Every row with every column, or with the columns of its group."""
    return result.numel() * matrix.shape[-1]


def _added(_: Tensor, matrix: Tensor, other: Tensor, *__: Any, **___: Any) -> int:
    return matrix.numel() * (other.shape[-1] if other.ndim > 1 else 1)


FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mkldnn_rnn_layer": _recurrent,
    "aten::_cudnn_rnn": _recurrent_on_gpu,
    "aten::_native_multi_head_attention": _self_attention,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "aten::_trilinear": _bilinear,
    "aten::_cdist_forward": _distances,
    "aten::mv": _rows,
    "aten::dot": _rows,
    "aten::vdot": _rows,
    "aten::_grouped_mm": _rows,
    "aten::_int_mm": _rows,
    "aten::addmv": _added,
    "aten::addbmm": _added,
    "torchvision::deform_conv2d": _sampled,
}
"""Name of an operator to its multiply-accumulates, from its arguments and its ``result``."""


class MacCounter(TorchDispatchMode):
    """Count what runs inside.

    Attributes:
        macs: Multiply-accumulates so far.
        layers: Name of a watched layer to the shape of its input and its multiply-accumulates.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.macs = 0
        self.layers: dict[str, tuple[tuple[int, ...], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and add what it costs."""
        del types
        kwargs = kwargs or {}
        ours, theirs = _formulas(func)
        if not ours and not theirs and isinstance(func, OpOverload) and func is not _DEVICE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if ours:
            self.macs += ours(*args, **kwargs, result=result)
        elif theirs:
            self.macs += theirs(*args, **kwargs, out_val=result) // 2
        return result

    @contextmanager
    def watch(self, module: nn.Module | None) -> Iterator[None]:
        """Note what the layers inside a module that runs whole cost, of all their calls together.

        Args:
            module: The module, or ``None`` for nothing to watch.
        """
        inside = [] if module is None else [(n, m) for n, m in module.named_modules() if n]
        layers = [(n, m) for n, m in inside if isinstance(m, _LAYERS)]
        handles = [handle for name, layer in layers for handle in self._hook(name, layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, layer: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        begins: list[int] = []

        def before(_: Any, args: Any) -> None:
            del args
            begins.append(self.macs)

        def after(_: Any, args: tuple[Any, ...], result: Any) -> None:
            del result
            known = self.layers.get(name, ((), 0))[1]
            self.layers[name] = (tuple(args[0].shape), known + self.macs - begins.pop())

        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)


def _formulas(func: Any) -> tuple[Any, Any]:
    """Return the formula of an operator in our table and in torch's; ``None`` where it has none."""
    if not isinstance(func, OpOverload):
        return None, flop_registry.get(func)
    return FORMULAS.get(func._schema.name), flop_registry.get(func._overloadpacket)

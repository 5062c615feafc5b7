"""Chains of normalisation, addition, activation function and fake-quant, which run as one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat.batch_norm import Stage, StagedBatchNorm, norm_in_use
from qat.fake_quant import FakeQuant
from qat.functional.chain import can_fuse, run_chain
from qat.functional.elements import SMOOTH
from qat.functional.fused import NO_CLAMP, Front, Grid, fused_fake_quantize
from qat.functional.layer_norm import fused_layer_norm
from qat.functional.layout import find_images
from qat.graph.op_names import op_name

CLAMPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}
METHODS = {"relu": F.relu, "relu6": F.relu6}
GELU = {"none": "gelu", "tanh": "gelu_tanh"}


class Activation(NamedTuple):
    """An activation function.

    Attributes:
        call: Computes it.
        clamp: The least and the greatest value, of what is one.
        smooth: The name of its kernels, of others.
    """

    call: Callable[[Tensor], Tensor]
    clamp: tuple[float, float] = NO_CLAMP
    smooth: str = ""


class Chain:
    """A normalisation, an addition and an activation function, any or none, and a fake-quant.

    Args:
        norm: A batch-norm of images, or a layer-norm with nothing else.
        activation: The function, if any.
        fake_quant: What puts values on the grid.
    """

    def __init__(
        self, norm: nn.Module | None, activation: Activation | None, fake_quant: FakeQuant
    ) -> None:
        self.norm, self.activation, self.fake_quant = norm, activation, fake_quant
        parts = (norm, None if activation is None else activation.call, fake_quant)
        self.modules = [part for part in parts if isinstance(part, nn.Module)]
        self.clamp = NO_CLAMP if activation is None else activation.clamp
        self.smooth = "" if activation is None else activation.smooth
        self.in_place = any(getattr(part, "inplace", False) for part in parts)
        self.__name__ = self.__qualname__ = "chain"  # generated code calls it by name

    def __call__(self, c: Tensor, other: Tensor | None = None) -> Tensor:
        """Return values on the grid, shape of ``c``; made as one where all parts allow it.

        Args:
            c: What comes in.
            other: What is added behind the batch-norm.
        """
        grid = self._grid(c)
        y = None if grid is None else self._as_one(c, Front(other, self.smooth), grid)
        return self._one_by_one(c, other) if y is None else y

    def _grid(self, c: Tensor) -> Grid | None:
        """Return the grid, if the fake-quant only snaps and nobody looks at what lies between."""
        if is_looked_at(self.modules) or not self.fake_quant.only_snaps:
            return None
        grid = self.fake_quant.quantizer.grid_of(c)
        if grid is None or grid.scale.numel() > 1 or not grid.has_bytes:
            return None
        return grid._replace(clamp=self.clamp)

    def _as_one(self, c: Tensor, front: Front, grid: Grid) -> Tensor | None:
        if isinstance(self.norm, nn.LayerNorm):
            return fused_layer_norm(c, self.norm, grid)
        if not can_fuse(c, front.other):
            return None
        if not isinstance(self.norm, StagedBatchNorm) or self.norm.stage is Stage.FOLDED:
            return fused_fake_quantize(c, grid, front)
        norm = None if find_images(c) is None else norm_in_use(self.norm, c)
        return None if norm is None else run_chain(c, norm, grid, front)

    def _one_by_one(self, c: Tensor, other: Tensor | None) -> Tensor:
        y = c if self.norm is None else self.norm(c)
        y = y if other is None else y + other
        return self.fake_quant(y if self.activation is None else self.activation.call(y))


def is_looked_at(modules: Iterable[nn.Module]) -> bool:
    """Return whether somebody has hooks on one of ``modules``, which must then run by itself."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def find_chain(
    node: fx.Node, modules: dict[str, nn.Module]
) -> tuple[Chain, tuple[fx.Node, ...]] | None:
    """Return the chain that ends in ``node`` and what it reads, if one is longer than itself."""
    fake_quant = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(fake_quant, FakeQuant):
        return None
    first, activation, source = node, None, _only_source(node)
    if source is not None:
        activation = _activation(source, modules)
    if source is not None and activation is not None:
        first, source = source, _only_source(source)
    inputs = None if source is None else _addends(source, modules)
    alone = [] if source is None else [(source,)]
    for c, *others in inputs or alone:
        norm = _norm(c, modules, alone=first is node and not inputs)
        if norm is not None:
            return Chain(norm, activation, fake_quant), (c.all_input_nodes[0], *others)
    if inputs:
        return Chain(None, activation, fake_quant), inputs[0]
    if activation is None:
        return None
    return Chain(None, activation, fake_quant), (first.all_input_nodes[0],)


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """Return the function that ``node`` computes, if there are kernels for it."""
    name, options = op_name(node, modules), dict(node.kwargs)
    call: Any = modules[str(node.target)] if node.op == "call_module" else None
    if _is_unary(node) and name in CLAMPS:
        return Activation(call or METHODS[name], clamp=CLAMPS[name])
    if not _is_unary(node) or node.op == "call_method":
        return None
    if call is None:
        options.pop("inplace", None)
        call = functools.partial(node.target, **options)  # pyright: ignore[reportArgumentType]
    if name == "gelu":
        name = GELU[str(getattr(call, "approximate", options.get("approximate", "none")))]
    return Activation(call, smooth=name) if name in SMOOTH else None


def _is_unary(node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not _changes(node)


def _only_source(node: fx.Node) -> fx.Node | None:
    """Return what ``node`` reads if it is all it reads, and nothing else reads it."""
    sources = node.all_input_nodes
    return sources[0] if len(sources) == 1 and len(sources[0].users) == 1 else None


def _changes(node: fx.Node) -> bool:
    """Whether ``node`` may change, in place, what other nodes read, too."""
    return node.target not in (operator.add, torch.add, "add") and len(node.args[0].users) > 1  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _addends(node: fx.Node, modules: dict[str, nn.Module]) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return the two tensors that ``node`` adds, in both orders."""
    if op_name(node, modules) != "add" or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b or _changes(node):
        return None
    return [(a, b), (b, a)]


def _norm(node: fx.Node, modules: dict[str, nn.Module], *, alone: bool) -> nn.Module | None:
    """Return the normalisation that ``node`` calls, if only one node reads it.

    Args:
        node: What stands in front of an addition, an activation function or a fake-quant.
        modules: Name to module of the captured model.
        alone: Whether it is a fake-quant: a layer-norm is only joined with that.
    """
    module = modules[str(node.target)] if node.op == "call_module" else None
    if len(node.users) > 1:
        return None
    if isinstance(module, StagedBatchNorm):
        return module if isinstance(module, nn.BatchNorm2d) else None
    plain = isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward
    return module if plain and alone else None

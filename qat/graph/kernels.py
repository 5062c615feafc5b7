"""What integer kernels there are for one operation, told from the plan before anything runs.

The integer reference decides the same from the codes that it meets; kernels take codes of at most
8 bits, and one scale for each accumulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from qat.graph.plan import Format, Plan, WeightSite
from qat.graph.sites import Sites
from qat.graph.views import display_name
from qat.quantizers import QUANTIZERS, Deployable, DynamicTensor
from qat.subclass import has_own_forward

KERNEL_BITS = 8
"""The widest codes that there are integer kernels for."""
PAIRS = ("add", "mul", "matmul")
"""Operations on two tensors of codes."""
_SECOND = ("other", "mat2")
_WIDE = f"integer kernels take codes of at most {KERNEL_BITS} bits"
_ROWS = "every row of its input brings a scale of its own"


def operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Return both operands of a call, ``None`` where it takes more, such as ``alpha``."""
    by_name = [kwargs[k] for k in ("input", *_SECOND) if k in kwargs]
    found = [*args, *by_name]
    return (found[0], found[1]) if len(found) == 2 and len(by_name) == len(kwargs) else None


class Kernels:
    """The integer kernels of one planned graph.

    Args:
        plan: Its weights and activations.
        sites: The sites of the graph.
        site_of: Root of a group to the name of the activation site that layers read.
    """

    def __init__(self, plan: Plan, sites: Sites, site_of: Mapping[fx.Node, str]) -> None:
        self.plan, self.sites, self.site_of = plan, sites, site_of

    def missing(self, node: fx.Node) -> str:
        """Return why no integer kernel computes ``node``, which reads codes; empty if one does."""
        op, inputs = self.sites.ops[node], self._inputs(node)
        formats = [f for f in inputs if f is not None]
        if any(n not in self.sites.data for n in self.sites.tensor_inputs(node)):
            return "an input is a constant of the model"
        if not inputs or len(formats) < len(inputs):
            return "an input stays float"
        if op in PAIRS and operands(node.args, node.kwargs) is None:
            return "no integer form for its options"
        if op == "average_pool" and not self._averages_images(node):
            is_mean = node.target in (torch.mean, "mean")
            return "no integer form for this operation" if is_mean else _reading(formats)
        if op == "average_pool":
            return _ROWS if _has_rows(formats) else ""
        return _reading(formats)

    def missing_layer(self, node: fx.Node) -> str:
        """Return why no integer kernel computes a layer that ``node`` calls; empty if one does."""
        layer = self.plan.weights.get(display_name(str(node.target)))
        if node.op != "call_module":
            return "its weight is computed and not stored"
        if layer is None:
            return "the scheme leaves this layer in float"
        if layer.op == "embedding":
            return ""
        (reads,) = self._inputs(node)[:1] or [None]
        return self._missing_for(layer, reads)

    def missing_inside(self, layer: WeightSite) -> str:
        """Return why no integer kernel computes a layer inside a module that runs whole."""
        reads = None if layer.source is None else self.plan.activations[layer.source].format
        return self._missing_for(layer, reads)

    def _missing_for(self, layer: WeightSite, reads: Format | None) -> str:
        kind = type(self.sites.modules[layer.path])
        if reads is None:
            return "an input stays float"
        if has_own_forward(kind):
            return f"the forward of {kind.__name__} cannot be traced"
        if layer.format.spec.group_size is not None:
            return "the groups of its weight have scales of their own"
        if layer.op == "linear" and _brings_grid(reads):
            return "" if layer.format.spec.bits <= KERNEL_BITS else _WIDE
        return _reading([reads, layer.format])

    def _inputs(self, node: fx.Node) -> list[Format | None]:
        sources = self.sites.tensor_inputs(node)
        whole = [n if n not in self.sites.mixed else None for n in sources]
        names = [n and self.site_of.get(self.sites.root(n)) for n in whole]
        return [None if name is None else self.plan.activations[name].format for name in names]

    def _averages_images(self, node: fx.Node) -> bool:
        """Whether every image becomes one value: its sum is an integer."""
        x, y = self.sites.tensor_inputs(node)[0].meta["shape"], node.meta["shape"]
        return len(x) == 4 and y is not None and prod(y) * x[2] * x[3] == prod(x)


def _reading(formats: list[Format]) -> str:
    """Return why codes of these formats are not computed with; empty if they are."""
    if _has_rows(formats):
        return _ROWS
    if any(map(_brings_grid, formats)):
        return "only linear layers have kernels for a grid that comes with the tensor"
    if any(f.deployable is Deployable.SIMULATION for f in formats):
        return "a quantizer without an integer form"
    return _WIDE if any(f.spec.bits > KERNEL_BITS for f in formats) else ""


def _has_rows(formats: list[Format]) -> bool:
    return any(QUANTIZERS[f.quantizer].is_dynamic and not _brings_grid(f) for f in formats)


def _brings_grid(form: Format) -> bool:
    return issubclass(QUANTIZERS[form.quantizer], DynamicTensor)

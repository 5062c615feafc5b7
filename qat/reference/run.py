"""The integer reference: run a graph on codes, and round where and as integer kernels round.

Simulation in float rounds every product and every partial sum a little; where a value lies close
to the middle between two codes it may take the other one than a chip does, and one such flip
spreads through the layers behind it. Here accumulators are exact integers, rounded once, onto the
grid of the site that reads them, behind one float32 multiplier: what onnxruntime's integer kernels
compute, code for code. Operations without an integer kernel run in float on the real values.

Source: Jacob et al., arXiv:1712.05877, section 2.2; the multiplier there is a fixed-point number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

from qat.batch_norm import Stage, StagedBatchNorm
from qat.codecs import ActivationCodec, DynamicTensorCodec, Lookup, make_codec
from qat.errors import VerificationError
from qat.export.packed_graph import PackedGraph
from qat.fake_quant import FakeQuant
from qat.functional.affine import full_precision
from qat.graph.captured import Captured
from qat.graph.data_arguments import change_arguments
from qat.graph.dataflow import find_data, written_by
from qat.graph.kernels import KERNEL_BITS, operands
from qat.graph.op_names import moves_codes, op_name
from qat.graph.ops import LAYERS, OPS, UNCHANGED
from qat.integer_layers import IntegerLayer
from qat.layers import QuantizedLayer
from qat.reference.kernels import PAIRS, accumulate, has_integer_kernel
from qat.reference.leaves import integer_layers
from qat.reference.sums import SharedSums
from qat.reference.values import Accumulator, Average, BroughtGrid, Clipped, Codes, Pending
from qat.signature import interface

Observer = Callable[[ActivationCodec, Tensor], Tensor]
Made = TypeVar("Made")
Quantize = FakeQuant | ActivationCodec | DynamicTensorCodec


class IntegerRun(fx.Interpreter):
    """A model that runs on integers; call it with a batch.

    Args:
        model: A captured model in its fold stage with every quantizer on, or a converted one.
        observer: Called at every quantize with its grid and the stored codes, float32; the run
            goes on with the codes that it returns.
        like: A run of another form of the same model, called with the same batch before this one:
            sums of equal factors are taken from there.

    Attributes:
        largest: Largest magnitude that an accumulator reached so far, by node.
        float_ops: What ran on real values in the last batch: name of the operation, by node.
    """

    kernel_bits = KERNEL_BITS
    """The widest codes that there are integer kernels for."""

    def __init__(
        self,
        model: Captured | PackedGraph | fx.GraphModule,
        observer: Observer | None = None,
        like: IntegerRun | None = None,
    ) -> None:
        graph = model.graphs["eval"] if isinstance(model, Captured) else model.graph
        super().__init__(model, graph=graph)
        if isinstance(model, Captured):
            self.signature, self.outputs = model.signature, model.outputs["eval"]
        else:
            self.signature, self.outputs = interface(model)
        self.observer = observer
        self.shared: SharedSums | None = None
        if like is not None:
            like.shared = like.shared or SharedSums()
            self.shared = SharedSums(like.shared)
        self.made: dict[tuple[FakeQuant, str], Any] = {}
        self.largest: dict[str, int] = {}
        self.float_ops: dict[str, str] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns in eval mode for one call, in the same form."""
        self.made.clear()
        self.float_ops.clear()
        if self.shared is not None:
            self.shared.known.clear()
        tensors = (
            self.signature.flatten(args, kwargs) if self.signature else [*args, *kwargs.values()]
        )
        tensors = [full_precision(x) for x in tensors]
        with torch.autocast(tensors[0].device.type, enabled=False):
            result = self.run(*tensors)
        return result if self.outputs is None else self.outputs.build(result)

    @cached_property
    def _aliased(self) -> set[fx.Node]:
        graph: Any = self.graph
        ops = {n: self._name(n) for n in graph.nodes}
        return find_data(ops, self.submodules, ops).aliased()

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of one node: a real tensor, ``Codes`` or a ``Pending`` result."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        result = self._on_integers(n, args, kwargs)
        if isinstance(result, Accumulator) and result is not args[0]:
            self._watch(n, result)
        result = self._on_reals(n, args, kwargs) if result is None else result
        if n in self._aliased:
            result = _real(result)  # a write into one of them is a write into all
        target = written_by(n, self.submodules)
        if target is not None and result is not None:
            self.env[target] = result
        return result

    def _on_reals(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        target = written_by(n, self.submodules)
        if target is not None and _is_value(args[0]):  # else the write would be lost
            self.env[target] = args[0].real()
            args = (self.env[target], *args[1:])
        with integer_layers(self._module(n), self._quantize, self.kernel_bits):
            name, result = self._name(n), self._call(n, args, kwargs, _real)
        moves = moves_codes(n, name) or _reads_rows(name, self._module(n))
        computes = n.op.startswith("call") and n.all_input_nodes and not moves
        if computes and name not in UNCHANGED and any(map(_is_real, tree_leaves(result))):
            self.float_ops[n.name] = name
        return result

    def _watch(self, n: fx.Node, result: Accumulator) -> None:
        """Remember the largest sum. Partial sums may wrap around: that undoes itself."""
        site = str(n.target) if n.op == "call_module" else n.name
        ends = result.sums.aminmax() if result.sums.numel() else ()
        largest = max((abs(int(end)) for end in ends), default=0)
        if largest >= 2 ** (result.bits - 1):
            raise VerificationError(
                f"expected sums of '{site}' that fit {result.bits} bits, got one of {largest:,}: "
                "give its weights or its input fewer bits."
            )
        self.largest[site] = max(largest, self.largest.get(site, 0))

    def _call(self, n: fx.Node, args: Any, kwargs: Any, change: Callable[[Any], Any]) -> Any:
        changed: Any = tree_map(change, (args, kwargs))
        return getattr(self, n.op)(n.target, *changed)

    def _name(self, n: fx.Node) -> str:
        return op_name(n, self.submodules)

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.submodules.get(str(n.target)) if n.op == "call_module" else None

    def _on_integers(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """Return what integer arithmetic makes of ``n``, or ``None`` where it has no say."""
        module = self._module(n)
        name, x = self._name(n), args[0] if args else None
        if isinstance(module, Quantize):
            return self._quantize(module, x)
        if _is_folded(module) or (name in UNCHANGED and _is_value(x)):
            return x
        if name in LAYERS and isinstance(x, Codes) and self._multiplies(name, module, x):
            if self.shared is None:
                return accumulate(module, x)
            return accumulate(module, x, partial(self.shared.get, str(n.target)))
        if name in ("relu", "relu6") and isinstance(x, Pending):
            return Clipped(x, 0.0, OPS[name].upper or float("inf"))
        return self._on_pairs(n, name, args, kwargs)

    def _on_pairs(self, n: fx.Node, name: str, args: Any, kwargs: Any) -> Any:
        if name in PAIRS:
            pair = operands(args, kwargs)
            return PAIRS[name](*pair) if pair and all(map(self._takes, pair)) else None
        if name == "average_pool" and isinstance(args[0], Codes):
            return self._average(n, args, kwargs)
        return self._move(n, args, kwargs) if moves_codes(n, name) else None

    def _multiplies(self, name: str, module: nn.Module | None, x: Codes) -> bool:
        if isinstance(x.grid, BroughtGrid) and name != "linear":
            return False  # runtimes have dynamic kernels for matrices alone
        return has_integer_kernel(module, x, self.kernel_bits)

    def _takes(self, x: Any) -> bool:
        narrow = isinstance(x, Codes) and x.grid.spec.bits <= self.kernel_bits
        return narrow and not isinstance(x.grid, BroughtGrid)

    def _quantize(self, module: Quantize, x: Any) -> Codes | None:
        lookup = self._lookup(module)
        x = x if lookup is None else lookup(_real(x))
        grid = self._grid(module, x)
        if grid is None:
            return None  # every token brings its own scale: no accumulator has a single one
        if isinstance(x, Pending) and not isinstance(grid, BroughtGrid):
            codes = self._round(x, grid).clamp_(grid.qmin, grid.qmax)
        else:
            codes = grid.codes(_real(x)).float()
        if self.observer is None:
            return Codes(codes.sub_(grid.zero_point.float()), grid)
        return Codes(self.observer(grid, codes) - grid.zero_point.float(), grid)

    def _lookup(self, module: Quantize) -> Lookup | None:
        return self._once(module, Lookup.of) if isinstance(module, FakeQuant) else None

    def _once(self, module: FakeQuant, make: Callable[[FakeQuant], Made]) -> Made:
        """Return what a fake-quant's parameters make: once a call, once inside ``hold``."""
        name = make.__name__
        if module.held is not None:
            return module.held.get(name, lambda: make(module))
        if (module, name) not in self.made:
            self.made[module, name] = make(module)
        return self.made[module, name]

    def _round(self, x: Pending, grid: ActivationCodec) -> Tensor:
        """Return stored codes of a result, not held in the range of its grid yet."""
        return x.codes(grid)

    def _grid(self, module: Quantize, x: Any) -> ActivationCodec | None:
        codec = self._once(module, make_codec) if isinstance(module, FakeQuant) else module
        if isinstance(codec, DynamicTensorCodec):
            return BroughtGrid(codec.site, _real(x), codec.spec)
        return codec if isinstance(codec, ActivationCodec) else None

    def _average(self, n: fx.Node, args: Any, kwargs: Any) -> Pending | None:
        """Average a whole image, whose sum is an integer, or windows."""
        x: Codes = args[0]
        count = x.steps[0, 0].numel() if x.steps.ndim == 4 else 0
        mean = self._call(n, args, kwargs, lambda v: _steps(v).double() if v is x else v)
        if mean.numel() * count == x.steps.numel():
            return Accumulator((mean * count).round(), x.grid.scale, count)
        return self._windows(n, args, kwargs, mean)

    def _windows(self, n: fx.Node, args: Any, kwargs: Any, mean: Tensor) -> Pending | None:
        """Return averages of windows, whose sums kernels make in float; ``mean`` is in steps."""
        is_mean = n.target in (torch.mean, "mean")
        takes = mean.numel() > 0 and self._takes(args[0]) and not is_mean
        return Average(self._call(n, args, kwargs, _real)) if takes else None

    def _move(self, n: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run what only moves values on the steps of codes, where all share one grid."""
        name, found = self._name(n), list[Any]()
        change_arguments(name, args, kwargs, found.append, _real)
        found = [v for v in found if _holds_values(v)]
        grids = {v.grid for v in found if isinstance(v, Codes)}
        if len(grids) != 1 or not all(isinstance(v, Codes) for v in found):
            return None
        (grid,) = grids
        moved = getattr(self, n.op)(n.target, *change_arguments(name, args, kwargs, _steps, _real))
        return map_aggregate(moved, lambda v: Codes(v, grid) if _is_real(v) else v)  # pyright: ignore[reportArgumentType]


def _reads_rows(name: str, module: nn.Module | None) -> bool:
    """Whether an embedding gives rows of codes, and computes nothing."""
    return name == "embedding" and isinstance(module, QuantizedLayer | IntegerLayer)


def _is_value(value: Any) -> bool:
    return isinstance(value, Codes | Pending)


def _holds_values(value: Any) -> bool:
    return _is_value(value) or _is_real(value)


def _real(value: Any) -> Any:
    return value.real() if _is_value(value) else value


def _steps(value: Any) -> Any:
    return value.steps if isinstance(value, Codes) else value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_folded(module: nn.Module | None) -> bool:
    return isinstance(module, StagedBatchNorm) and module.stage is Stage.FOLDED

"""Functions of elements, compiled by Inductor into one loop each, for tensors of every size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("qat")
MOST_ELEMENTS = 2**31 - 1
"""Of a tensor: kernels of GPUs count in 32 bits."""
_EXAMPLES = {"n": 2**21, "r": 512, "b": 4096, "i": 64, "c": 128, "p": 1024}
"""Sizes that loops are planned for: elements; rows, in each; images, channels, pixels."""
_ALL_IN_ONE_LOOP = dict.fromkeys(
    ("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"), 1000
)
_ON_CUDA = {"eager_numerics.division_rounding": True}  # a division there is a product otherwise


class Kernel:
    """A function compiled for tensors of every size, when it first meets a mix of types.

    ``torch.compile`` would do the same, and look at every argument of every call again: five times
    longer than a small tensor takes, where a step has hundreds of calls. Here sizes are symbols,
    ranks are fixed, and types are all that is looked at. Where nothing can be compiled, such as
    without a compiler or on a full disk, the function runs as it is, slower.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
        function: Computes each element from a few others; what it uses twice is computed twice. It
            takes tensors, of which some may be ``None``, and returns a tuple of them.
        shapes: Of each argument, a letter or ``1`` for each axis. Letters are sizes, the same
            wherever they stand, and never 1; all tensors are contiguous.

    Attributes:
        failure: Why a mix of types could not be compiled; empty if all could.
    """

    def __init__(
        self, device_type: str, function: Callable[..., tuple[Tensor, ...]], shapes: Sequence[str]
    ) -> None:
        self.device_type, self.function, self.shapes = device_type, function, shapes
        self.failure = ""
        self._made: dict[tuple[Any, ...], Callable[[list[Tensor]], Sequence[Tensor]]] = {}

    def __call__(self, *inputs: Tensor | None) -> Sequence[Tensor]:
        """Return what the function does, without history."""
        key = (torch.get_num_threads(), *[None if x is None else x.dtype for x in inputs])
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._compile(key[1:])
        return made([x for x in inputs if x is not None])

    def _compile(self, dtypes: Sequence[torch.dtype | None]) -> Any:
        device = self.device_type
        examples = [
            torch.empty([_EXAMPLES.get(axis, 1) for axis in shape], dtype=dtype, device=device)
            for shape, dtype in zip(self.shapes, dtypes, strict=True)
            if dtype is not None
        ]

        def present(*given: Tensor) -> tuple[Tensor, ...]:
            rest = iter(given)
            return self.function(*(None if dtype is None else next(rest) for dtype in dtypes))

        with torch.no_grad(), torch.autocast(device, enabled=False):
            try:
                return _compile(present, examples)
            except Exception as error:  # a compiler that is missing, a cache that is full, ...
                self.failure = str(error).strip().partition("\n")[0][:200]
                _warn(self.failure)

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return present(*inputs)

        return run


@functools.cache
def _warn(reason: str) -> None:
    """Say once what runs uncompiled, and why."""
    log.warning("fake-quantization runs uncompiled and slower: %s", reason)


def _compile(function: Callable[..., Any], examples: list[Tensor]) -> Any:
    """Return ``function`` compiled, for tensors of the ranks of ``examples``."""
    from torch._inductor import config  # these take seconds, which only training pays
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    table = select_decomp_table()
    traced = make_fx(function, decomposition_table=table, tracing_mode="symbolic")(*examples)
    fakes = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
    options = {**_ALL_IN_ONE_LOOP, **(_ON_CUDA if examples[0].is_cuda else {})}
    with V.set_fake_mode(fakes[0].fake_mode), config.patch(options):
        made = compile_fx_inner(traced, fakes)
    if examples[0].is_cuda:  # whose first call has more to do
        return made
    return getattr(made, "current_callable", None) or made


@functools.cache
def bound(code: float, device: torch.device) -> Tensor:
    """Return the end of a grid as the tensor that kernels take, so that no width is compiled in."""
    return torch.tensor(float(code), device=device)


def as_bytes(codes: Tensor) -> Tensor:
    """Return whole numbers from 0 to 255 as uint8; straight from float would not be vectorised."""
    return codes.to(torch.int32).to(torch.uint8)

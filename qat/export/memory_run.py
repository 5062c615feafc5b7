"""How much memory a graph of a file would take, known before any of it is taken.

The graph runs once on tensors without content; what lives at the same time is added up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qat.errors import ExportError
from qat.export.calls import CheckedCalls
from qat.export.quiet import quiet
from qat.memory import available

_TIMES = 4
"""Sums of integers are kept in float64, beside the codes that they are made of."""


class MemoryRun(CheckedCalls):
    """Run a graph on tensors without content, and stop where it would take too much memory.

    Args:
        model: Holds the graph.
        graph: Its graph.
        modules: What the graph calls, by name.
        constants: What it reads, by name.
        limit: Bytes that may live at the same time.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        constants: Mapping[str, Tensor],
        limit: int,
    ) -> None:
        super().__init__(model, graph=graph)
        self.look_up(modules, constants)
        self.limit = limit

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of one node, without content.

        Raises:
            ExportError: If too much would live beside it.
        """
        value = super().run_node(n)
        alive: dict[int, int] = {}
        for kept in (value, *self.env.values()):
            _add_storages(kept, alive)
        wanted = _TIMES * sum(alive.values())
        if wanted > self.limit:
            raise ExportError(
                f"{wanted / 2**30:,.1f} GiB at '{n.name}', where {self.limit / 2**30:,.1f} are free"
            )
        return value


def _add_storages(value: Any, alive: dict[int, int]) -> None:
    """Add the bytes of every tensor in ``value``, by storage: views share theirs.

    A view counts with all of its elements where it repeats them: what reads it reads all.
    """
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        size = max(storage.nbytes(), value.numel() * value.element_size())
        alive[storage._cdata] = max(size, alive.get(storage._cdata, 0))
    elif isinstance(value, tuple | list):
        for part in value:
            _add_storages(part, alive)


def check_memory(
    model: nn.Module,
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    constants: Mapping[str, Tensor],
    inputs: tuple[Tensor, ...],
) -> None:
    """Run a graph on inputs without their content, and refuse what would not fit in memory.

    Args:
        model: Holds the graph.
        graph: The graph.
        modules: What it calls, by name.
        constants: What it reads, by name.
        inputs: What it is to be called with.

    Raises:
        ExportError: If it would take more memory than is free, or how much depends on values.
    """
    run = MemoryRun(model, graph, modules, constants, available())
    with quiet(logging.ERROR), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        run.run(*(mode.from_tensor(x) for x in inputs))

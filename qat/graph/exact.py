"""What is read before it is quantized: values that become ids, masks or other decisions.

An id that a grid rounds names another row of a table; a mask ``x != 0`` loses what a grid rounds to
0. So what decides reads the tensor itself, and fake-quants stand behind it, in front of those that
read the same tensor as data. What an integer kernel makes exists as codes alone: decisions read
those.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from qat.graph.data_arguments import data_arguments
from qat.graph.dataflow import Dataflow
from qat.graph.op_names import module_name
from qat.graph.ops import OPS, UNCHANGED, UNKNOWN

_IN_KERNELS = UNCHANGED | {"relu", "relu6", "batch_norm"}
"""What the kernel in front computes as well, before it rounds."""


class Exact:
    """Which nodes of one graph decide, and which values they need as they are.

    Args:
        nodes: The nodes of a captured graph, in order.
        modules: Name to module of the captured model.
        ops: Node to the name of its operation.
        flow: What holds data, and what is written in place.

    Attributes:
        data: Node to those of its arguments that are data.
        deciders: What turns real values into decisions.
        given: What those are computed from where no parameter takes part: it stays float.
        values: What is read unquantized, once ``find_values`` ran.
        alone: What nothing but decisions is computed from.
    """

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        modules: dict[str, nn.Module],
        ops: dict[fx.Node, str],
        flow: Dataflow,
    ) -> None:
        self.nodes, self.modules, self.ops, self.flow = nodes, modules, ops, flow
        self.data = {n: data_arguments(n, ops[n]) for n in nodes}
        self.deciders = {n for n in nodes if self._decides(n)}
        learned: set[fx.Node] = set()
        for node in nodes:
            if self._has_parameters(node) or not learned.isdisjoint(self.data[node]):
                learned.add(node)
        self.given = self._needed(without=learned)
        self.values: set[fx.Node] = set()
        self.alone: set[fx.Node] = set()

    def find_values(self, reads_codes: set[fx.Node]) -> None:
        """Find what is read unquantized.

        Args:
            reads_codes: The nodes that read codes.
        """
        rounded: set[fx.Node] = set()
        for node in self.nodes:
            in_kernel = self.ops[node] in _IN_KERNELS and rounded.issuperset(self.data[node])
            if node in reads_codes or in_kernel:
                rounded.add(node)
        self.values = self._needed(without=rounded)
        for node in self.nodes:
            if self._moves(node) and self.values.isdisjoint(self.data[node]):
                self.values.discard(node)
        for node in reversed(self.nodes):
            if node.users and all(map(self._leads_to_decisions, node.users)):
                self.alone.add(node)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return what reads ``node`` unquantized."""
        users = node.users if node in self.values else []
        return [u for u in users if node in self.data[u] and u in self.deciders | self.values]

    def _leads_to_decisions(self, node: fx.Node) -> bool:
        return node in self.deciders or (node in self.alone and node in self.values)

    def _needed(self, *, without: set[fx.Node]) -> set[fx.Node]:
        """Return what decisions are computed from, up to the nodes ``without``.

        Whatever writes into a tensor before a decision reads it takes part.
        """
        found: set[fx.Node] = set()
        memory: set[fx.Node] = set()
        for node in reversed(self.nodes):
            target = self.flow.writes.get(node)
            if target is not None and self.flow.storage[target] in memory:
                found |= {node} - without
            if node in self.deciders or node in found:
                needed = {n for n in self.data[node] if n not in without}
                found |= needed
                memory |= {self.flow.storage[n] for n in needed}
        return found

    def _decides(self, node: fx.Node) -> bool:
        """Whether ``node`` makes integers of real values, rounds them, or may look at them."""
        if not node.op.startswith("call") or self._moves(node):
            return False
        jumps = OPS.get(self.ops[node], UNKNOWN).decides or node.meta.get("has_integers", False)
        is_real = any(n.meta.get("shape") is not None for n in self.data[node])
        return is_real and (jumps or self._is_whole(node))

    def _is_whole(self, node: fx.Node) -> bool:
        """Whether ``node`` calls a module of the user's that could not be opened."""
        if node.op != "call_module":
            return False
        module = self.modules[str(node.target)]
        return not module_name(module) and not type(module).__module__.startswith("torch.nn.")

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return name in self.modules[owner]._parameters
        return node.op == "call_module" and any(
            True for _ in self.modules[str(node.target)].parameters()
        )

    def _moves(self, node: fx.Node) -> bool:
        row = OPS.get(self.ops[node], UNKNOWN)
        return row.passes or row.joins

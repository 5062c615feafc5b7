"""Sites: the names and groups of the tensors that one graph makes.

A site is named after the module (or the function inside a module) that makes the tensor, never
after a graph's own node names. Repeats are numbered; so that the train and the eval graph agree on
the numbers, what one line of code makes in both has the same name in both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from qat.graph.dataflow import find_data
from qat.graph.exact import Exact
from qat.graph.op_names import moves_codes, op_name
from qat.graph.ops import LAYERS, OPS, UNKNOWN, WEIGHTED, Op
from qat.graph.view_modules import View
from qat.graph.views import display_name
from qat.subclass import has_own_forward

_FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Group:
    """Tensors that share one scale: one producer, or all inputs of a concatenation.

    Attributes:
        name: The site's name.
        producers: The nodes that make its values.
        placed: The nodes behind which the fake-quant stands, with those that read past it.
        readers: The nodes that read the group as codes.
        nonnegative: No member has a negative value.
    """

    name: str
    producers: list[fx.Node]
    placed: dict[fx.Node, list[fx.Node]]
    readers: list[fx.Node]
    nonnegative: bool


class Sites:
    """Everything about one graph that planning asks for.

    Args:
        graph: A captured graph.
        modules: Name to module of the captured model.
        like: The sites of the other mode, whose names to take over.
        tabulate: Whether functions that can be looked up read codes.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        like: Sites | None = None,
        *,
        tabulate: bool = False,
    ) -> None:
        self.nodes = list(graph.nodes)
        self.modules = modules
        self.tabulate = tabulate
        self.ops = {n: op_name(n, modules) for n in self.nodes}
        self.names = self._name_nodes(like)
        self.flow = find_data(self.nodes, modules, self.ops)
        self.data = self.flow.data
        self.exact = Exact(self.nodes, modules, self.ops, self.flow)
        self.nonnegative = self._find_nonnegative()
        self.reads_codes = self._find_readers()
        self.exact.find_values(self.reads_codes)
        self._root = {n: n for n in self.nodes}
        for node in self.nodes:
            if self.moves(node) and node not in self.exact.alone:
                for source in self.tensor_inputs(node):
                    self._root[self.root(source)] = self.root(node)
        self.late = self._find_late()
        self.rewritten = self.flow.changed | self.flow.aliased() | self.flow.overwritten(self.late)
        self.mixed = self._find_mixed()

    def op(self, node: fx.Node) -> Op:
        """Return the row of the op table for ``node``."""
        return OPS.get(self.ops[node], UNKNOWN)

    def moves(self, node: fx.Node) -> bool:
        """Whether the values of ``node`` are those of tensors that it reads."""
        op = self.op(node)
        return (op.passes or op.joins) and bool(self.tensor_inputs(node))

    def root(self, node: fx.Node) -> fx.Node:
        """Return the representative of the group that ``node`` belongs to."""
        while self._root[node] is not node:
            node = self._root[node]
        return node

    def layers(self) -> list[fx.Node]:
        """Return the calls of layers that multiply what comes from the data, in order."""
        return [n for n in self.weighted() if self.ops[n] in LAYERS]

    def weighted(self) -> list[fx.Node]:
        """Return the calls of modules that own a weight, embeddings too, in order."""
        calls = [n for n in self.nodes if n.op == "call_module" and n in self.data]
        return [n for n in calls if self.ops[n] in WEIGHTED]

    def groups(self) -> dict[fx.Node, Group]:
        """Return root to group for every group that some operation reads as codes."""
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            members[self.root(node)].append(node)
        result: dict[fx.Node, Group] = {}
        for node in self.nodes:
            if node in self.reads_codes:
                for source in self.tensor_inputs(node):
                    root = self.root(source)
                    group = result.setdefault(root, self._group(members[root]))
                    group.readers.append(node)
        return {root: group for root, group in result.items() if group.producers and group.placed}

    def tensor_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return what ``node`` reads as data: tensors of real values, or tuples of them."""
        return [n for n in self.exact.data[node] if self._carries(n)]

    def residual_name(self, group: Group) -> str:
        """Return the name of what additions read of a group, where layers read it otherwise."""
        return self._new_name(f"{group.name}.residual", set(self.names.values()))

    def batch_norm_behind(self, node: fx.Node) -> str | None:
        """Name the batch-norm that reads nothing but this layer, each called once."""
        users = list(node.users)
        calls_it = node.op == "call_module" and len(users) == 1 and users[0].op == "call_module"
        if self.ops[node] not in LAYERS or not calls_it:
            return None
        if has_own_forward(type(self.modules[str(node.target)])):
            return None  # what it makes of its weight and bias is not known
        name = str(users[0].target)
        calls = [n for n in self.nodes if n.op == "call_module" and n.target in (node.target, name)]
        rank_fits = self.ops[node] != "linear" or len(node.meta["shape"]) == 2
        return name if is_foldable(self.modules[name]) and rank_fits and len(calls) == 2 else None

    def _carries(self, node: fx.Node) -> bool:
        """Whether ``node`` holds values of a tensor, and not sizes."""
        return self._is_tensor(node) or self.moves(node)

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.meta.get("shape") is not None

    def _group(self, members: list[fx.Node]) -> Group:
        producers = [n for n in members if not self.moves(n) and n not in self.flow.filled]
        producers = [n for n in producers if self._is_tensor(n) and n in self.data]
        joins = [n for n in members if self.op(n).joins]
        name = self.names[(joins + producers + members)[0]]
        nonnegative = all(self.nonnegative[n] for n in producers)
        return Group(name, producers, self._placed(members, producers), [], nonnegative)

    def _placed(
        self, members: list[fx.Node], producers: list[fx.Node]
    ) -> dict[fx.Node, list[fx.Node]]:
        """Return where fake-quants stand: behind the moves of what is decided on.

        None stands behind what is written into afterwards: it would read the values of before.
        """
        placed: dict[fx.Node, list[fx.Node]] = {n: [] for n in producers if n not in self.late}
        for node in [n for n in members if n in self.late & self.data]:
            readers = {n for n in node.users if node in self.exact.data[n]}
            quantized = readers - self.late - set(self.exact.readers(node))
            if quantized and self._is_tensor(node) and node not in self.rewritten:
                placed[node] = [n for n in node.users if n not in quantized]
        return placed

    def _find_late(self) -> set[fx.Node]:
        """Return what decisions read unquantized, and what is moved of it."""
        found = set(self.exact.values)
        for node in self.nodes:
            sources = self.tensor_inputs(node) if self.op(node).passes else []
            if any(n in found and self.root(n) is self.root(node) for n in sources):
                found.add(node)
        return found

    def _name_nodes(self, like: Sites | None) -> dict[fx.Node, str]:
        known: dict[object, list[str]] = defaultdict(list)
        if like is not None:
            for node, name in like.names.items():
                known[like._place(node)].append(name)
        used = {name for same in known.values() for name in same}
        names: dict[fx.Node, str] = {}
        for node in self.nodes:
            same = known[self._place(node)]
            names[node] = same.pop(0) if same else self._new_name(self._base_name(node), used)
            used.add(names[node])
        return names

    def _place(self, node: fx.Node) -> object:
        lines = () if node.op in ("placeholder", "get_attr") else node.meta.get("lines")
        return self._base_name(node), lines

    def _new_name(self, base: str, used: set[str]) -> str:
        name, number = base, 1
        while name in used or (name != base and name in self.modules):
            number += 1
            name = f"{base}_{number}"
        return name

    def _base_name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return display_name(str(node.target))
        if node.op == "placeholder":
            return f"input.{node.target}"
        if node.op == "get_attr":
            return str(node.target)
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack.values()))[0] if stack else ""
        return f"{owner}.{self.ops[node]}" if owner else self.ops[node]

    def _find_mixed(self) -> set[fx.Node]:
        """Return the nodes that hold values on a grid beside others: constants, a padding of 1."""
        found = self.flow.filled | self.rewritten
        for node in self.nodes:
            if not self.moves(node):
                continue
            sources = self.tensor_inputs(node)
            adds = not moves_codes(node, self.ops[node])
            if adds or any(n not in self.data or n in found for n in sources):
                found.add(node)
        return found

    def _find_nonnegative(self) -> dict[fx.Node, bool]:
        result: dict[fx.Node, bool] = {}
        for node in self.nodes:
            op = self.op(node)
            inherits = op.passes or op.joins or self.ops[node] in ("average_pool", "add", "mul")
            sources = [result[n] for n in self.tensor_inputs(node)]
            if self.ops[node] in ("add", "mul"):
                constants = [*node.args, *node.kwargs.values()]
                sources += [a >= 0 for a in constants if isinstance(a, int | float)]
            result[node] = op.nonnegative or (inherits and bool(sources) and all(sources))
        return result

    def _find_readers(self) -> set[fx.Node]:
        """Return the nodes that read their inputs as codes."""
        folded = {self.batch_norm_behind(n) for n in self.nodes if n.op == "call_module"}
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            op = self.op(node)
            alone = self.ops[node] == "batch_norm" and node.target not in folded
            useful = op.elementwise and self._joins_data(node)
            useful = useful and any(n in found for n in self._readers_behind(node))
            table = self.tabulate and op.tabulated
            reads = op.reads_codes or alone or useful or table
            if node in self.data and node not in self.exact.given and reads:
                found.add(node)
        return found

    def _joins_data(self, node: fx.Node) -> bool:
        tensors = [n for n in node.args if isinstance(n, fx.Node) and self._carries(n)]
        return len(tensors) >= 2 and all(n in self.data for n in self.tensor_inputs(node))

    def _readers_behind(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            op = self.op(user)
            if op.passes or op.joins or self.ops[user] in ("relu", "relu6"):
                yield from self._readers_behind(user)
            else:
                yield user


def is_foldable(module: nn.Module) -> bool:
    """Whether a module is a batch-norm, of torch's own class or a view of one, with statistics."""
    kind = type(module)
    is_norm = kind in _FOLDABLE or (isinstance(module, View) and isinstance(module, _FOLDABLE))
    return is_norm and module.running_mean is not None

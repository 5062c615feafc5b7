"""What stays float, and why."""

from __future__ import annotations

from torch import fx, nn

from qat.graph.kernels import Kernels
from qat.graph.op_names import module_name, moves_codes
from qat.graph.ops import LAYERS, WEIGHTED
from qat.graph.plan import FloatOp, Plan
from qat.graph.sites import Sites

_ABSORBED = ("relu", "relu6")
"""What becomes an end of the range of the quantize behind it."""


def float_ops(plan: Plan, sites: Sites, site_of: dict[fx.Node, str]) -> list[FloatOp]:
    """Return what stays float in one graph, and why.

    Args:
        plan: The plan so far: all weights and activations.
        sites: The sites of the graph.
        site_of: Root of a group to the name of its activation site.
    """
    folded = {w.batch_norm for w in plan.weights.values()}
    kernels = Kernels(plan, sites, site_of)
    result: list[FloatOp] = []
    for node in sites.nodes:
        moves = moves_codes(node, sites.ops[node]) or sites.ops[node] in ("input", "output")
        is_real = node.meta.get("is_real") or node.meta.get("macs")
        computes = node in sites.data - sites.flow.filled
        if not is_real or not computes or moves or node.target in folded:
            continue
        reason = _reason(kernels, sites, node)
        if reason:
            macs = _macs(kernels, node)
            result.append(FloatOp(sites.names[node], sites.ops[node], macs, reason))
        known = {*plan.weights, *(f.name for f in result)}
        result += [f for f in _idle(sites, node) if f.name not in known]
    return result


def _idle(sites: Sites, node: fx.Node) -> list[FloatOp]:
    """Return the layers of a module that runs whole that the example did not reach."""
    if node.op != "call_module" or _is_torch(sites.modules[str(node.target)]):
        return []
    ran = {f"{node.target}.{name}" for name in node.meta.get("inner", {})}
    inside = [k for k in sites.modules if k.startswith(f"{node.target}.") and k not in ran]
    names = {k: module_name(sites.modules[k]) for k in inside}
    why = "the example did not reach it"
    return [FloatOp(k, op, 0, why) for k, op in names.items() if op in LAYERS]


def _is_torch(module: nn.Module) -> bool:
    """Whether a class is torch's own: it may hold layers that it never calls."""
    return type(module).__module__.startswith("torch.")


def _reason(kernels: Kernels, sites: Sites, node: fx.Node) -> str:
    op, row = sites.ops[node], sites.op(node)
    if op in WEIGHTED:
        return kernels.missing_layer(node)
    if node in sites.exact.given and (row.reads_codes or row.elementwise):
        return "ids or masks are computed from its exact values"
    if row.elementwise and node not in sites.reads_codes:
        return "nothing behind it reads integers"
    if row.reads_codes or row.elementwise:
        return kernels.missing(node)
    return "" if op in _ABSORBED else "no integer form for this operation"


def _macs(kernels: Kernels, node: fx.Node) -> int:
    """Return the cost of a node without the layers inside that have integer kernels."""
    inside = node.meta.get("inner", {})
    layers = {name: kernels.plan.weights.get(f"{node.target}.{name}") for name in inside}
    integer = [k for k, w in layers.items() if w and w.inner and not kernels.missing_inside(w)]
    return int(node.meta.get("macs", 0)) - sum(inside[name][1] for name in integer)

"""What stays float, and why."""

from __future__ import annotations

from torch import fx

from qat.graph.ops import WEIGHTED
from qat.graph.plan import FloatOp, Plan
from qat.graph.sites import Sites
from qat.graph.views import display_name

_INTEGER_FORMS = ("add", "mul", "embedding")


def float_ops(plan: Plan, sites: Sites, site_of: dict[fx.Node, str]) -> list[FloatOp]:
    """Return what stays float in one graph, and why.

    Args:
        plan: The plan so far: all weights and activations.
        sites: The sites of the graph.
        site_of: Root of a group to the name of its activation site.
    """
    folded = {w.batch_norm for w in plan.weights.values()}
    result: list[FloatOp] = []
    for node in sites.nodes:
        row = sites.op(node)
        moves = row.passes or row.joins or sites.ops[node] == "input"
        is_real = node.meta.get("shape") is not None and node in sites.data
        if not is_real or moves or node.target in folded:
            continue
        reason = _reason(plan, sites, site_of, node)
        if reason:
            result.append(FloatOp(sites.names[node], sites.ops[node], _macs(plan, node), reason))
    return result


def _reason(plan: Plan, sites: Sites, site_of: dict[fx.Node, str], node: fx.Node) -> str:
    op, row = sites.ops[node], sites.op(node)
    inputs = [sites.root(n) in site_of for n in sites.tensor_inputs(node)]
    if op in WEIGHTED and display_name(str(node.target)) not in plan.weights:
        return "the scheme leaves this layer in float"
    if node in sites.exact.given and (row.reads_codes or row.elementwise):
        return "ids or masks are computed from its exact values"
    if node in sites.reads_codes and not all(inputs):
        return "an input stays float"
    if row.elementwise and node not in sites.reads_codes:
        return "nothing behind it reads integers"
    has_form = row.reads_codes or op in _INTEGER_FORMS
    if not has_form and (_macs(plan, node) or not row.nonnegative):
        return "no integer form for this operation"
    return ""


def _macs(plan: Plan, node: fx.Node) -> int:
    """Return the cost of a node without the quantized layers inside."""
    inner = [w for w in plan.weights.values() if w.inner and w.within(node.target)]
    return int(node.meta.get("macs", 0)) - sum(w.macs for w in inner)

"""The plan as a table for people."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from qat.graph.plan import Plan


def plan_table(plan: Plan) -> str:
    """Return the plan as text: weights, activations, what stays float and why, totals."""
    weights = Table("layer", "op", "weight", "reads", "batch-norm", "MACs", title="weights")
    for w in plan.weights.values():
        norm = f"{w.batch_norm} ({w.batch_norm_mode})" if w.batch_norm else "-"
        weights.add_row(w.layer, w.op, str(w.format), w.source or "float", norm, f"{w.macs:,}")
    activations = Table("site", "made by", "format", title="activations")
    for a in plan.activations.values():
        activations.add_row(a.name, a.op, str(a.format))
    tables = [weights, activations]
    if plan.floats:
        floats = Table("operation", "op", "MACs", "why", title="stays float")
        for f in plan.floats:
            floats.add_row(f.name, f.op, f"{f.macs:,}", f.reason)
        tables.append(floats)
    out = io.StringIO()
    console = Console(file=out, width=140, color_system=None)
    for table in tables:
        console.print(table)
    console.print(
        f"scheme {plan.scheme}: {len(plan.weights)} weights, {len(plan.activations)} activations, "
        f"{plan.macs:,} multiply-accumulates a sample, {plan.float_share:.2%} of them stay float"
    )
    return out.getvalue().rstrip()

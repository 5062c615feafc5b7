"""Plans as tables for people."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from qat.graph.lint import Finding, summary
from qat.graph.plan import Plan
from qat.graph.preview import Preview, Row, Totals, differences, rows, totals
from qat.spec import FLOAT

WIDTH = 140
_RIGHT = ("MACs", "share", "bytes")


def plan_table(plan: Plan) -> str:
    """Return the plan as text: weights, activations, what stays float and why, totals."""
    weights = Table("layer", "op", "weight", "reads", "batch-norm", "MACs", title="weights")
    for w in plan.weights.values():
        norm = f"{w.batch_norm} ({w.batch_norm_mode})" if w.batch_norm else "-"
        weights.add_row(w.layer, w.op, str(w.format), w.source or "float", norm, f"{w.macs:,}")
    activations = Table("site", "made by", "format", title="activations")
    for a in plan.activations.values():
        activations.add_row(a.name, a.op, str(a.format))
    return _render(
        weights,
        activations,
        *_float_tables(plan),
        f"scheme {plan.scheme}: {len(plan.weights)} weights, {len(plan.activations)} activations, "
        f"{plan.macs:,} multiply-accumulates a sample, {plan.float_share:.2%} of them stay float",
        *_section("changed in the model", plan.notes),
    )


def preview_table(shown: Preview, findings: Sequence[Finding], target: str) -> str:
    """Return a preview as text: sites, what stays float and why, totals, rules, target lint.

    Args:
        shown: The preview.
        findings: What the target makes of its plan.
        target: The target's name.
    """
    plan = shown.plan
    sites = _table("site", "op", "shape", "weight", "activation", "quantizer/observer", *_RIGHT)
    for row in rows(plan):
        macs = (f"{row.macs:,}", f"{row.share:.2%}") if row.kind == "weight" else ("-", "-")
        cells = (row.site, row.op, _shape(row.shape), row.weight, row.activation, row.parts)
        sites.add_row(*cells, *macs, f"{row.size_bytes:,}")
    return _render(
        sites,
        *_float_tables(plan),
        _totals_table({plan.scheme: totals(plan)}),
        *_section("changed in the model", plan.notes),
        *_section("rules that match nothing", shown.unmatched),
        *_section(f"target {target}", summary(findings) or ["no finding"]),
    )


def diff_table(first: Plan, second: Plan, names: tuple[str, str]) -> str:
    """Return what differs between two plans as text: formats and bytes side by side, totals.

    Args:
        first: A plan.
        second: Another, of the same model or not.
        names: How to call them.
    """
    columns = [f"{name}{what}" for name in names for what in ("", " bytes")]
    sites = _table("site", "of", *columns)
    pairs = differences(first, second)
    for a, b in pairs:
        known = a or b
        assert known is not None
        sites.add_row(known.site, known.kind, *_side(a), *_side(b))
    head = f"{len(pairs)} sites differ" if pairs else "no site differs"
    both = _totals_table(dict(zip(names, (totals(first), totals(second)), strict=True)))
    return _render(*([sites] if pairs else []), head, both)


def _side(row: Row | None) -> tuple[str, str]:
    return (FLOAT, "-") if row is None else (row.format, f"{row.size_bytes:,}")


def _totals_table(columns: dict[str, Totals]) -> Table:
    table, sums = _table("total", *columns, right=tuple(columns)), columns.values()
    table.add_row("multiply-accumulates a sample", *(f"{t.macs:,}" for t in sums))
    table.add_row("  with quantized weights", *(f"{t.share_in_weights:.2%}" for t in sums))
    table.add_row("  and quantized activations", *(f"{t.share_in_both:.2%}" for t in sums))
    table.add_row("bytes of the weights, float", *(f"{t.weight_float_bytes:,}" for t in sums))
    table.add_row("  quantized", *(_size(t.weight_bytes, t.weight_float_bytes) for t in sums))
    table.add_row(
        "bytes of a sample's activations, float", *(f"{t.activation_float_bytes:,}" for t in sums)
    )
    table.add_row(
        "  quantized", *(_size(t.activation_bytes, t.activation_float_bytes) for t in sums)
    )
    table.add_row("ONNX opset that has the formats", *(str(t.opset) for t in sums))
    return table


def _size(quantized: int, in_float: int) -> str:
    return f"{quantized:,} ({quantized / in_float:.1%})" if in_float else f"{quantized:,}"


def _float_tables(plan: Plan) -> list[Table]:
    if not plan.floats:
        return []
    floats = Table("operation", "op", "MACs", "why", title="stays float")
    for f in plan.floats:
        floats.add_row(f.name, f.op, f"{f.macs:,}", f.reason)
    return [floats]


def _table(*columns: str, right: Sequence[str] = _RIGHT) -> Table:
    table = Table()
    for column in columns:
        is_number = column in right or column.endswith(" bytes")
        table.add_column(column, justify="right" if is_number else "left")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"\n{title}:", *(f"  {line}" for line in lines)] if lines else []


def _render(*parts: Table | str) -> str:
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None)
    for part in parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    return out.getvalue().rstrip()

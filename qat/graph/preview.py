"""A preview: the plan of a model without a run, its rows, and what differs between two plans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from qat.calls import Call
from qat.errors import GraphError
from qat.graph.lint import needed_opset
from qat.graph.plain_model import capture_plain
from qat.graph.plan import ActivationSite, Plan, WeightSite
from qat.graph.planner import make_plan
from qat.spec import FLOAT, Scheme

_UNMATCHED = re.compile(r"expected rule '(.+?)' of scheme ")


@dataclass(frozen=True)
class Preview:
    """A plan, and a sentence for every rule that matches nothing."""

    plan: Plan
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What becomes of one site.

    Attributes:
        kind: Whether it is a layer's weight or an activation.
        site: The layer, or the activation site.
        op: What the layer does, or what makes the tensor.
        shape: Of the weight, or of one sample of the activation.
        weight: The weight's number format; ``-`` for an activation.
        activation: That of the activation, or of what the layer reads.
        parts: Quantizer and observer.
        macs: Multiply-accumulates for one sample.
        share: Their share in the whole model, 0 to 1.
        size_bytes: Bytes of the codes and scales.
        float_bytes: Bytes in float.
    """

    kind: Literal["weight", "activation"]
    site: str
    op: str
    shape: tuple[int, ...]
    weight: str
    activation: str
    parts: str
    macs: int
    share: float
    size_bytes: int
    float_bytes: int

    @property
    def format(self) -> str:
        """Its own number format with quantizer and observer."""
        return f"{self.weight if self.kind == 'weight' else self.activation}, {self.parts}"


@dataclass(frozen=True)
class Totals:
    """The sums over a plan; shares are 0 to 1, activations those of one sample."""

    macs: int
    share_in_weights: float
    share_in_both: float
    weight_bytes: int
    weight_float_bytes: int
    activation_bytes: int
    activation_float_bytes: int
    opset: int


def preview(model: nn.Module, scheme: Scheme, example: Tensor | Call) -> Preview:
    """Plan ``model``; rules that match nothing are collected instead of raised.

    Args:
        model: A float model; it stays as it is.
        scheme: What it should become.
        example: One batch as the model takes it, ``(N, ...)``; the values do not matter.

    Raises:
        GraphError: If the model cannot be traced or planned.
        SpecError: If a format does not fit a site, or no rule matches anything.
    """
    captured, plain = capture_plain(model, example)
    rules, unmatched = dict(scheme.rules), list[str]()
    while True:
        try:
            plan = make_plan(captured, replace(scheme, rules=rules))
        except GraphError as error:
            found = _UNMATCHED.match(str(error))
            if found is None:
                raise
            del rules[found[1]]  # it patched nothing: the plan is the same without it
            unmatched.append(str(error))
        else:
            plan.notes = plain.notes
            return Preview(plan, tuple(unmatched))


def rows(plan: Plan) -> list[Row]:
    """Return the rows of a plan: every activation, and behind it the layers that read it."""
    result: list[Row] = []
    for site in plan.activations.values():
        result.append(_activation_row(site))
        result += _weight_rows(plan, site.name)
    return result + list(_weight_rows(plan, None))


def totals(plan: Plan) -> Totals:
    """Return the sums over a plan."""
    weights, activations = plan.weights.values(), plan.activations.values()
    return Totals(
        macs=plan.macs,
        share_in_weights=sum(w.macs for w in weights) / plan.macs if plan.macs else 0.0,
        share_in_both=1 - plan.float_share,
        weight_bytes=sum(w.size_bytes for w in weights),
        weight_float_bytes=sum(w.float_bytes for w in weights),
        activation_bytes=sum(a.size_bytes for a in activations),
        activation_float_bytes=sum(a.float_bytes for a in activations),
        opset=needed_opset(plan),
    )


def differences(first: Plan, second: Plan) -> list[tuple[Row | None, Row | None]]:
    """Return the rows of both plans where their formats differ; ``None`` where a site is float."""
    left, right = ({(r.kind, r.site): r for r in rows(plan)} for plan in (first, second))
    keys = [*left, *(key for key in right if key not in left)]
    pairs = [(left.get(key), right.get(key)) for key in keys]
    return [(a, b) for a, b in pairs if a is None or b is None or a.format != b.format]


def _activation_row(site: ActivationSite) -> Row:
    form = site.format
    return Row(
        "activation",
        site.name,
        site.op,
        site.shape[1:],
        "-",
        str(form.spec),
        f"{form.quantizer}/{form.observer}",
        0,
        0.0,
        site.size_bytes,
        site.float_bytes,
    )


def _weight_rows(plan: Plan, source: str | None) -> Iterator[Row]:
    reads = FLOAT if source is None else str(plan.activations[source].format.spec)
    layers: list[WeightSite] = [w for w in plan.weights.values() if w.source == source]
    for layer in layers:
        form = layer.format
        yield Row(
            "weight",
            layer.layer,
            layer.op,
            layer.shape,
            str(form.spec),
            reads,
            f"{form.quantizer}/{form.observer}",
            layer.macs,
            layer.macs / plan.macs if plan.macs else 0.0,
            layer.size_bytes,
            layer.float_bytes,
        )

"""Planning: decide what a scheme means for one model, before anything changes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from qat.errors import GraphError, SpecError
from qat.graph.measure import measure
from qat.graph.plan import ActivationSite, FloatOp, Format, Plan, WeightSite
from qat.graph.sites import Group, Sites
from qat.graph.trace import MODES, Captured
from qat.spec import FLOAT, BatchNormMode, QuantSpec, Rule, Scheme

_FOLDABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Rules:
    """The rules of a scheme, and which of them found something."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.used: set[str] = set()
        self.seen: set[str] = set()

    def patch(self, name: str, tags: frozenset[str], kind: str) -> dict[str, object] | None:
        """Merge what all matching rules say of ``kind``; ``None`` where it stays float."""
        merged: dict[str, object] | None = None
        self.seen.add(name)
        for key, rule in self.scheme.rules.items():
            if not rule.matches(name, tags):
                continue
            self.used.add(key)
            change = rule.weight if kind == "weight" else rule.activation
            if change == FLOAT:
                merged = None
            elif isinstance(change, Mapping):
                merged = {**(merged or {}), **change}
        return merged

    def check_all_used(self) -> None:
        for key in self.scheme.rules:
            if key not in self.used:
                raise GraphError(self._unmatched(key, self.scheme.rules[key]))

    def _unmatched(self, key: str, rule: Rule) -> str:
        near = difflib.get_close_matches(rule.match.strip("*@"), sorted(self.seen), n=3, cutoff=0.3)
        return (
            f"expected rule '{key}' of scheme '{self.scheme.name}' to match a site, got none for "
            f"match='{rule.match}': correct the pattern (close names: "
            f"{', '.join(near) or 'none'}) or remove the rule."
        )


def make_plan(captured: Captured, scheme: Scheme) -> Plan:
    """Decide what ``scheme`` makes of a captured model; nothing is changed.

    Args:
        captured: The model, before anything is inserted.
        scheme: Rules; later ones win.

    Raises:
        GraphError: If a rule matches nothing.
        SpecError: If a format does not fit a site.
    """
    measure(captured)
    plan, rules = Plan(scheme.name), _Rules(scheme)
    modules: dict[str, nn.Module] = dict(captured.named_modules())
    sites = None
    for mode in reversed(MODES):  # eval first: heads that only training runs stay float
        sites = Sites(captured.graphs[mode], modules, sites)
        _plan_graph(plan, rules, sites, mode)
    plan.batch_norms = [
        n for n, m in modules.items() if type(m) in _FOLDABLE and m.running_mean is not None
    ]
    rules.check_all_used()
    return plan


def _plan_graph(plan: Plan, rules: _Rules, sites: Sites, mode: str) -> None:
    layers, groups = sites.layers(), sites.groups()
    ends = {layers[0]: "first", layers[-1]: "last"} if layers else {}
    both = layers[0] if len(layers) == 1 else None
    tags_of = {n: {t for t in (ends.get(n), "first" if n is both else None) if t} for n in layers}
    placed: dict[str, str] = {}
    site_of: dict[fx.Node, str] = {}
    for root, group in groups.items():
        tags = {sites.ops[n] for n in group.producers}
        tags |= {f"to:{sites.ops[n]}" for n in group.readers}
        tags = tags.union(*(tags_of.get(n, set()) for n in group.readers))
        site = _activation_site(rules, group, frozenset(tags), sites)
        if site is not None and (mode == "eval" or site.name in plan.activations):
            plan.activations.setdefault(site.name, site)
            site_of[root] = site.name
            placed.update({n.name: site.name for n in group.producers})
    plan.placements[mode] = placed
    for node in layers:
        tags = frozenset({sites.ops[node], *tags_of[node]})
        site = _weight_site(rules, node, tags, sites, site_of)
        if site is not None and (mode == "eval" or site.layer in plan.weights):
            plan.weights[site.layer] = _merge(plan.weights.get(site.layer), site, mode)
    if mode == "eval":
        plan.macs = sum(n.meta["macs"] for n in sites.nodes)
        plan.floats = _floats(plan, sites, site_of)


def _merge(known: WeightSite | None, site: WeightSite, mode: str) -> WeightSite:
    """Keep one site for a layer that is called several times, as eval mode has it.

    Its inputs may have several scales; its batch-norm can be folded only if both modes allow it.
    """
    if known is None:
        return site
    source = known.source if mode == "train" or known.source == site.source else None
    norm = known.batch_norm if known.batch_norm == site.batch_norm else None
    macs = known.macs if mode == "train" else known.macs + site.macs
    return replace(known, source=source, batch_norm=norm, macs=macs)


def _activation_site(
    rules: _Rules, group: Group, tags: frozenset[str], sites: Sites
) -> ActivationSite | None:
    patch = rules.patch(group.name, tags, "activation")
    if patch is None:
        return None
    if patch.get("signed", "auto") == "auto":
        patch["signed"] = not group.nonnegative
    if not patch["signed"]:
        patch["narrow"] = False
    producer = group.producers[0]
    format_ = _format(group.name, patch)
    if format_.spec.axis is not None:
        raise SpecError(f"expected one scale for activation '{group.name}', got axis: drop axis.")
    return ActivationSite(group.name, sites.ops[producer], producer.meta["shape"], format_)


def _weight_site(
    rules: _Rules,
    node: fx.Node,
    tags: frozenset[str],
    sites: Sites,
    site_of: dict[fx.Node, str],
) -> WeightSite | None:
    name, op = str(node.target), sites.ops[node]
    patch = rules.patch(name, tags, "weight")
    if patch is None:
        return None
    if op.startswith("conv_transpose") and patch.get("axis") == 0:
        patch["axis"] = 1  # where a transposed convolution keeps its output channels
    format_ = _format(name, patch)
    shape = _weight_shape(name, sites.modules[name])
    try:
        format_.spec.scale_shape(shape)
    except SpecError as error:
        raise SpecError(f"layer '{name}': {error}") from None
    norm = _batch_norm_behind(node, sites)
    return WeightSite(
        layer=name,
        op=op,
        shape=shape,
        format=format_,
        source=site_of.get(sites.root(node.all_input_nodes[0])),
        batch_norm=norm,
        batch_norm_mode=_batch_norm_mode(rules.scheme, format_.spec),
        macs=node.meta["macs"],
    )


def _weight_shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise GraphError(
            f"expected layer '{name}' to own its weight, got one that is computed in "
            f"{type(layer).__name__}: remove the parametrization, or leave the layer in float."
        )
    return tuple(weight.shape)


def _format(name: str, patch: dict[str, object]) -> Format:
    values: dict[str, Any] = dict(patch)
    parts = [values.pop(key, None) for key in ("quantizer", "observer")]
    if "bits" not in values or None in parts:
        missing = [k for k in ("bits", "quantizer", "observer") if not patch.get(k)]
        raise SpecError(
            f"expected the rules to give bits, quantizer and observer for site '{name}', "
            f"got no {', '.join(missing)}: set them in the first rule."
        )
    try:
        return Format(QuantSpec(**values), *map(str, parts))
    except SpecError as error:
        raise SpecError(f"site '{name}': {error}") from None


def _batch_norm_mode(scheme: Scheme, spec: QuantSpec) -> BatchNormMode:
    """Only codes that can change sign, at a free scale, can take a batch-norm in afterwards."""
    movable = spec.symmetric and spec.signed and spec.narrow and not spec.power_of_two
    return scheme.batch_norm if movable else "folded"


def _batch_norm_behind(node: fx.Node, sites: Sites) -> str | None:
    """Name the batch-norm that reads nothing but this layer, each called once."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    name = str(users[0].target)
    norm = sites.modules[name]
    calls = [n for n in sites.nodes if n.op == "call_module" and n.target in (node.target, name)]
    rank_fits = sites.ops[node] != "linear" or len(node.meta["shape"]) == 2
    foldable = type(norm) in _FOLDABLE and norm.running_mean is not None
    return name if foldable and rank_fits and len(calls) == 2 else None


def _floats(plan: Plan, sites: Sites, site_of: dict[fx.Node, str]) -> list[FloatOp]:
    folded = {w.batch_norm for w in plan.weights.values()}
    result: list[FloatOp] = []
    for node in sites.nodes:
        op, name, macs = sites.ops[node], sites.names[node], int(node.meta["macs"])
        row = sites.op(node)
        if node.meta.get("shape") is None or name in folded or row.passes or row.joins:
            continue
        if op in ("output", "input", "constant"):
            continue
        inputs = [sites.root(n) in site_of for n in sites.tensor_inputs(node)]
        reason = ""
        if node.op == "call_module" and node in sites.layers() and node.target not in plan.weights:
            reason = "the scheme leaves this layer in float"
        elif row.reads_codes and not all(inputs):
            reason = "an input stays float"
        elif not row.reads_codes and (macs or not row.nonnegative):
            reason = "no integer form for this operation"
        if reason:
            result.append(FloatOp(name, op, macs, reason))
    return result

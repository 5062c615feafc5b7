"""Planning: decide what a scheme means for one model, before anything changes."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from qat.errors import SpecError
from qat.graph.captured import MODES, Captured
from qat.graph.floats import float_ops
from qat.graph.op_names import module_name
from qat.graph.ops import LAYERS
from qat.graph.plan import ActivationSite, Plan, WeightSite
from qat.graph.residual import branch_off, by_kind
from qat.graph.rules import Rules, batch_norm_mode, make_format, weight_format, weight_shape
from qat.graph.sites import Group, Sites, is_foldable
from qat.graph.views import display_name
from qat.spec import Scheme


def make_plan(captured: Captured, scheme: Scheme) -> Plan:
    """Decide what ``scheme`` makes of a captured model; nothing is changed.

    Args:
        captured: The model, before anything is inserted.
        scheme: Rules; later ones win.

    Raises:
        GraphError: If a rule matches nothing.
        SpecError: If a format does not fit a site.
    """
    plan, rules = Plan(scheme.name), Rules(scheme)
    modules: dict[str, nn.Module] = dict(captured.named_modules())
    sites = None
    for mode in reversed(MODES):  # eval first: heads that only training runs stay float
        tabulate = scheme.functions == "table"
        sites = Sites(captured.graphs[mode], modules, sites, tabulate=tabulate)
        _plan_graph(plan, rules, sites, mode)
    plan.batch_norms = [name for name, module in modules.items() if is_foldable(module)]
    rules.check_all_used()
    plan.idle = list(rules.effects.idle())
    return plan


def _plan_graph(plan: Plan, rules: Rules, sites: Sites, mode: str) -> None:
    layers = sites.layers()
    ends = {layers[0]: "first", layers[-1]: "last"} if layers else {}
    both = layers[0] if len(layers) == 1 else None
    tags_of = {n: {t for t in (ends.get(n), "first" if n is both else None) if t} for n in layers}
    site_of = _plan_activations(plan, rules, sites, mode, tags_of)
    for node in sites.weighted():
        tags = frozenset({sites.ops[node], *tags_of.get(node, set())})
        site = _weight_site(rules, node, tags, sites, site_of)
        if site is not None and (mode == "eval" or site.layer in plan.weights):
            plan.weights[site.layer] = _merge(plan.weights.get(site.layer), site, mode)
    for node in sites.data:
        _plan_inner(plan, rules, node, sites, mode)
    if mode == "eval":
        plan.macs = sum(n.meta.get("macs", 0) for n in sites.data)
        plan.floats = float_ops(plan, sites, site_of)


def _plan_activations(
    plan: Plan, rules: Rules, sites: Sites, mode: str, tags_of: dict[fx.Node, set[str]]
) -> dict[fx.Node, str]:
    """Plan what stands behind nodes; return the root of each group to the site that layers read."""
    placed, branches = plan.placements.setdefault(mode, {}), plan.branches.setdefault(mode, {})
    exact = plan.exact.setdefault(mode, {})
    site_of: dict[fx.Node, str] = {}
    for root, group in sites.groups().items():
        found = _activation_sites(rules, group, tags_of, sites)
        found = [s for s in found if mode == "eval" or s.name in plan.activations]
        plan.activations.update({s.name: plan.activations.get(s.name, s) for s in found})
        if found:
            placed.update({n.name: found[0].name for n in group.placed})
            exact.update({n.name: tuple(r.name for r in p) for n, p in group.placed.items() if p})
            site_of[root] = found[-1].name
        if len(found) > 1:
            branches.update(branch_off(sites, group, found[-1].name))
    return site_of


def _plan_inner(plan: Plan, rules: Rules, node: fx.Node, sites: Sites, mode: str) -> None:
    """Plan the layers inside a module that runs whole: each quantizes its input by itself."""
    for name, (shape, macs) in node.meta.get("inner", {}).items():
        path = f"{node.target}.{name}"
        module = sites.modules[path]
        op = module_name(module)
        known = plan.weights.get(path)
        if known is not None and known.inner and mode == "eval":  # called once more
            plan.weights[path] = replace(known, macs=known.macs + macs)
        if known is not None or op not in LAYERS:
            continue
        form = weight_format(rules, path, module, frozenset({op}))
        if form is None:
            continue
        patch = rules.patch(f"{path}.input", frozenset({f"to:{op}"}), "activation")
        source = None if patch is None else f"{path}.input"
        if source is not None and patch is not None:
            patch |= {"signed": True} if patch.get("signed", "auto") == "auto" else {}
            plan.activations[source] = ActivationSite(
                source, "leaf", shape, make_format(source, patch)
            )
        weight = weight_shape(path, module)
        mode = batch_norm_mode(rules.scheme, form.spec)
        plan.weights[path] = WeightSite(
            path, op, weight, form, source, None, mode, macs, inner=True
        )


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


def _activation_sites(
    rules: Rules, group: Group, tags_of: dict[fx.Node, set[str]], sites: Sites
) -> list[ActivationSite]:
    """Return the site of a group; two, wide one first, where layers read fewer bits than sums."""

    def site(readers: list[fx.Node], name: str) -> ActivationSite | None:
        tags = {sites.ops[n] for n in group.producers} | {f"to:{sites.ops[n]}" for n in readers}
        tags = tags.union(*(tags_of.get(n, set()) for n in readers))
        return _activation_site(rules, group, frozenset(tags), sites, name)

    residual, layers = by_kind(sites, group)
    if residual and layers:
        wide, narrow = site(residual, sites.residual_name(group)), site(layers, group.name)
        if wide and narrow and wide.format.spec.bits > narrow.format.spec.bits:
            return [wide, narrow]
    whole = site(group.readers, group.name)
    return [] if whole is None else [whole]


def _activation_site(
    rules: Rules, group: Group, tags: frozenset[str], sites: Sites, name: str
) -> ActivationSite | None:
    patch = rules.patch(group.name, tags, "activation")
    if patch is None:
        return None
    if patch.get("signed", "auto") == "auto":
        patch["signed"] = not group.nonnegative
    if not patch["signed"]:
        patch["narrow"] = False
    producer = group.producers[0]
    format_ = make_format(name, patch)
    if format_.spec.axis is not None:
        raise SpecError(f"expected one scale for activation '{name}', got axis: drop axis.")
    return ActivationSite(name, sites.ops[producer], producer.meta["shape"], format_)


def _weight_site(
    rules: Rules,
    node: fx.Node,
    tags: frozenset[str],
    sites: Sites,
    site_of: dict[fx.Node, str],
) -> WeightSite | None:
    path, op = str(node.target), sites.ops[node]
    name, module = display_name(path), sites.modules[path]
    format_ = weight_format(rules, name, module, tags)
    if format_ is None:
        return None
    shape = weight_shape(name, module)
    norm = sites.batch_norm_behind(node)
    return WeightSite(
        layer=name,
        op=op,
        shape=shape,
        format=format_,
        source=site_of.get(sites.root(sites.exact.data[node][0])),
        batch_norm=norm,
        batch_norm_mode=batch_norm_mode(rules.scheme, format_.spec),
        macs=node.meta["macs"],
        module="" if path == name else path,
    )

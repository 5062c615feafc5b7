"""Insertion: carry a plan out. It has no opinions of its own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import fx, nn

from qat.batch_norm import stage_batch_norm
from qat.fake_quant import FakeQuant, make_fake_quant
from qat.graph.captured import Captured
from qat.graph.equality import check_equal
from qat.graph.plain_model import capture_plain
from qat.graph.plan import ActivationSite, Plan, WeightSite
from qat.graph.planner import make_plan
from qat.layers import Links, quantize_layer, quantized_layers
from qat.spec import Scheme

CONTAINER = "activations"


def activation_key(site: str) -> str:
    """Return the name of a site's fake-quant inside its container; names cannot hold dots."""
    return site.replace(".", "/")


def insert(captured: Captured, plan: Plan) -> None:
    """Put the plan's fake-quants into a captured model, in place; all start in phase FLOAT.

    Args:
        captured: The model that the plan was made for.
        plan: What goes where.
    """
    container = nn.Module()
    for site in plan.activations.values():
        container.add_module(activation_key(site.name), _activation_quant(site))
    captured.add_module(CONTAINER, container)
    for mode, placed in plan.placements.items():
        for node in list(captured.graphs[mode].nodes):
            branch = plan.branches[mode].get(node.name)
            if branch is not None:  # first: what stands behind the node then stands in front of it
                _insert_behind(node, branch.site, branch.readers)
            if node.name in placed:
                past = plan.exact[mode].get(node.name, ())
                quantized = [n.name for n in node.users if n.name not in past]
                _insert_behind(node, placed[node.name], tuple(quantized))
    for name in plan.batch_norms:
        fixed = name in captured.evaluated
        stage_batch_norm(captured.get_submodule(name), fixed=fixed)
    for site in plan.weights.values():
        _quantize_weight(captured, container, site)
    captured.recompile()


def _activation_quant(site: ActivationSite) -> FakeQuant:
    form = site.format
    return make_fake_quant(
        site.name,
        form.spec,
        site.shape,
        quantizer=form.quantizer,
        options=form.options,
        observer=form.observer,
        has_batch=True,
    )


def _insert_behind(node: fx.Node, site: str, readers: tuple[str, ...]) -> None:
    """Let ``readers`` read what the fake-quant of ``site`` makes of ``node``."""
    with node.graph.inserting_after(node):
        target = f"{CONTAINER}.{activation_key(site)}"
        quant = node.graph.create_node("call_module", target, (node,))
    node.replace_all_uses_with(quant, delete_user_cb=lambda user: user.name in readers)


def _quantize_weight(captured: Captured, container: nn.Module, site: WeightSite) -> None:
    layer = captured.get_submodule(site.path)
    weight_quant = _weight_quant_of_twin(captured, layer, site) or _weight_quant(site)
    source = None if site.source is None else container._modules[activation_key(site.source)]
    assert source is None or isinstance(source, FakeQuant)
    norm = None if site.batch_norm is None else captured.get_submodule(site.batch_norm)
    links = Links(norm, site.batch_norm_mode, source, site.inner)
    quantize_layer(layer, weight_quant, links)


def _weight_quant(site: WeightSite) -> FakeQuant:
    form = site.format
    return make_fake_quant(
        f"{site.layer}.weight",
        form.spec,
        site.shape,
        quantizer=form.quantizer,
        options=form.options,
        observer=form.observer,
        has_batch=False,
    )


def _weight_quant_of_twin(
    captured: Captured, layer: nn.Module, site: WeightSite
) -> FakeQuant | None:
    """Return the fake-quant of a layer that has the very same weight, and the same format."""
    weight = layer._parameters["weight"]
    for _, other in quantized_layers(captured):
        if (
            other._parameters["weight"] is weight
            and other.weight_quant.quantizer.spec == site.format.spec
        ):
            return other.weight_quant
    return None


def prepare(model: nn.Module, scheme: Scheme, example: Any) -> tuple[Captured, Plan]:
    """Return a copy of ``model`` with fake-quants inserted but off, and the plan that says where.

    Weights that are computed from others, and floats of other widths, become plain float32.

    Args:
        model: The user's float model; it stays as it is.
        scheme: What it should become.
        example: One batch as the model takes it: a tensor ``(N, ...)``, a tuple of arguments, or a
            mapping of arguments by name; two or more samples, so that batch-norm can be checked in
            training mode. Axis 0 is the batch of most tensors; those of another length have none.

    Raises:
        GraphError: If the model cannot be traced, has complex weights, or computes something else
            afterwards.
        SpecError: If a format does not fit a site.
    """
    captured, plain = capture_plain(model, example)
    plan = make_plan(captured, scheme)
    plan.notes = plain.notes
    insert(captured, plan)
    check_equal(deepcopy(plain.model), deepcopy(captured), after="capture and insertion")
    return captured, plan

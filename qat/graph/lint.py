"""Target lint: check a plan against where it will run, before hours are spent on training it.

A finding is an error where the exported file cannot run as it stands, or cannot be made at all; a
warning where it runs without the gain that was hoped for, or may compute something else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from qat.errors import GraphError
from qat.graph.plan import ActivationSite, Format, Plan, WeightSite
from qat.graph.targets import Target
from qat.quantizers import Deployable
from qat.spec import QuantSpec

Level = Literal["warning", "error"]
FILE = "model.onnx"
_MOVED = 128  # what is added to signed 8-bit activations where they are stored


@dataclass(frozen=True)
class Finding:
    """What a target makes of one site.

    Attributes:
        level: ``"warning"`` or ``"error"``.
        site: The activation site, ``<layer>.weight``, ``model.onnx`` for the whole file, or
            ``rule <name>``.
        message: What is wrong, a colon, what to do; equal for all sites with the same remedy.
    """

    level: Level
    site: str
    message: str


def lint(plan: Plan, target: Target) -> list[Finding]:
    """Return what ``target`` makes of a plan: errors first, each in the order of the graph.

    Args:
        plan: The plan; it is not changed.
        target: Where it will run.
    """
    found = [f for site in plan.activations.values() for f in _activation(site, target)]
    found += [f for site in plan.weights.values() for f in _weight(site, plan, target)]
    found += _file(plan, target)
    found += [Finding("warning", f"rule {name}", message) for name, message in plan.idle]
    return sorted(found, key=lambda finding: finding.level != "error")


def check(plan: Plan, target: Target) -> list[Finding]:
    """Return the warnings of ``lint``, none of which is an error.

    Raises:
        GraphError: If the plan is impossible on ``target``.
    """
    findings = lint(plan, target)
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        first = errors[0]
        raise GraphError(
            f"expected a plan that can run with target={target.name}, got {len(errors)} "
            f"error{'s' * (len(errors) > 1)}, first '{first.site}': {first.message}."
        )
    return findings


def summary(findings: Iterable[Finding]) -> list[str]:
    """Return a line for every kind of finding: how many sites, the first, what to do."""
    sites: dict[tuple[Level, str], list[str]] = defaultdict(list)
    for finding in findings:
        sites[finding.level, finding.message].append(finding.site)
    lines: list[str] = []
    for (level, message), names in sites.items():
        where = f"{len(names)} sites, first '{names[0]}'" if len(names) > 1 else f"'{names[0]}'"
        lines.append(f"{level}: {where}: {message}")
    return lines


def needed_opset(plan: Plan) -> int:
    """Return the oldest ONNX opset that has the plan's formats; files are written in 21.

    Source: QuantizeLinear in versions 10, 13 (one scale per channel) and 21 (16 bits, blocks).
    """
    weights = [w.format.spec for w in plan.weights.values()]
    specs = [*weights, *(a.format.spec for a in plan.activations.values())]
    if any(s.bits > 8 or s.group_size is not None for s in specs):
        return 21
    return 13 if any(s.axis is not None for s in specs) else 10


def _activation(site: ActivationSite, target: Target) -> Iterator[Finding]:
    spec = site.format.spec
    yield from _form(site.name, site.format, target, stored=False)
    yield from _width(site.name, "activations", spec, target)
    if not (spec.symmetric or target.affine_activations):
        yield Finding(
            _severity(target),
            site.name,
            f"an affine format has a zero point and {target.runtime} takes 0 only: "
            "set symmetric=true for this activation",
        )
    elif target.int8_only and not target.affine_activations and 127 < spec.qmax < 256:
        yield Finding(
            _severity(target),
            site.name,
            f"unsigned codes up to {spec.qmax} do not fit the int8 that {target.runtime} takes "
            "at zero point 0: set signed=true for this activation",
        )


def _weight(site: WeightSite, plan: Plan, target: Target) -> Iterator[Finding]:
    name, spec = f"{site.layer}.weight", site.format.spec
    out = 1 if site.op.startswith("conv_transpose") else 0
    if spec.axis not in (None, out) and site.shape[spec.axis or 0] > 1:
        yield Finding(
            "error",
            name,
            "a scale for each input cannot be taken out of the sum over the inputs: set axis=0, "
            "the output channels, or axis=null",
        )
    yield from _form(name, site.format, target, stored=True)
    yield from _width(name, "weights", spec, target)
    if spec.group_size is not None and not target.group_weights:
        yield Finding(_severity(target), name, _no_kernel("group_size", target, "group_size=null"))
    if not (spec.symmetric or target.affine_weights):
        yield Finding(
            _severity(target), name, _no_kernel("affine weights", target, "symmetric=true")
        )
    elif not spec.signed and target.int8_only:
        yield Finding(
            _severity(target), name, _no_kernel("unsigned weights", target, "signed=true")
        )
    yield from _dynamic(site, plan, target)
    if _saturates(site, plan, target):
        yield Finding(
            "warning",
            name,
            f"sums of two products may pass {target.pair_limit} and are cut off in "
            f"{target.runtime}: give what this layer reads 7 bits from 0, activation: "
            "{bits: 7, signed: false}, and symmetric: false where it has negative values",
        )


def _form(name: str, form: Format, target: Target, *, stored: bool) -> Iterator[Finding]:
    """Check that the quantizer has a form there at all; codes of weights are stored, not made."""
    word = form.quantizer
    if form.deployable is Deployable.SIMULATION and target.exports:
        yield Finding(
            "error",
            name,
            f"the quantizer {word} has no integer form, so no file can hold it: set "
            "target=simulation for a run that ends with accuracies and without files",
        )
    elif form.deployable is Deployable.TABLE and not stored and target.bits is not None:
        remedy = "quantizer=lsq or another of a uniform grid if speed is the aim"
        yield Finding("warning", name, _no_kernel(f"the table of {word}", target, remedy))


def _dynamic(site: WeightSite, plan: Plan, target: Target) -> Iterator[Finding]:
    """Check what reads a grid that comes with the values; only matrices have kernels for one."""
    quantizer = plan.activations[site.source].format.quantizer if site.source else ""
    if target.bits is None or not quantizer.startswith("dynamic"):
        return
    if quantizer == "dynamic" or site.op != "linear":
        kind = "a scale for each token" if quantizer == "dynamic" else f"{site.op} of dynamic codes"
        remedy = "quantizer=dynamic_tensor in front of linear layers, lsq or uniform elsewhere"
        yield Finding("warning", f"{site.layer}.weight", _no_kernel(kind, target, remedy))


def _width(name: str, what: str, spec: QuantSpec, target: Target) -> Iterator[Finding]:
    if target.bits is None or spec.bits == target.bits:
        return
    if spec.bits > target.bits:
        kind = f"{spec.bits}-bit {what}"
        yield Finding(_severity(target), name, _no_kernel(kind, target, f"bits={target.bits}"))
        return
    packed = "; model.safetensors is packed" if what == "weights" else ""
    if what == "weights" and spec.bits <= 4:
        packed += ", and so is model.onnx with export.storage=size"
    yield Finding(
        "warning",
        name,
        f"{spec.bits}-bit {what} are stored in {target.bits} bits and no faster in "
        f"{target.runtime}{packed}: set bits={target.bits} if speed is the aim",
    )


def _no_kernel(what: str, target: Target, remedy: str) -> str:
    instead = "refuses it" if target.refuses else "computes in float there"
    return f"{target.runtime} has no integer kernel for {what} and {instead}: set {remedy}"


def _severity(target: Target) -> Level:
    return "error" if target.refuses else "warning"


def _saturates(site: WeightSite, plan: Plan, target: Target) -> bool:
    """Whether two products at their worst pass what the target adds up; 8-bit kernels only."""
    spec = site.format.spec
    if target.pair_limit is None or site.source is None or not spec.signed or spec.bits > 8:
        return False
    source = plan.activations[site.source].format.spec
    weight = max(-spec.qmin, spec.qmax) * spec.storage_gain
    activation = source.qmax + (_MOVED if source.signed else 0)
    return source.bits <= 8 and 2 * weight * activation > target.pair_limit


def _file(plan: Plan, target: Target) -> Iterator[Finding]:
    if target.int8_only and plan.activations:
        yield Finding(
            _severity(target),
            FILE,
            "activations are stored in uint8, signed ones at zero point 128, and "
            f"{target.runtime} takes int8: {_into_int8(target)}",
        )
    if target.opset is not None and needed_opset(plan) > target.opset:
        yield Finding(
            "error",
            FILE,
            f"these formats need opset {needed_opset(plan)} and {target.runtime} reads up to "
            f"{target.opset}: use 8 bits without group_size",
        )


def _into_int8(target: Target) -> str:
    if target.name == "xnnpack":
        return "write model.pte from model.safetensors with scripts/lower.py, which does that"
    skip = "; target=generic skips this check" if target.refuses else ""
    return f"subtract 128 from codes and zero points in the file, which changes no value{skip}"

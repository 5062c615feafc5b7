"""Rules applied: the formats that a scheme gives to the sites of one model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from qat.channels import channel_axis
from qat.errors import GraphError, SpecError
from qat.graph.effects import Effects
from qat.graph.plan import Format
from qat.quantizers import QUANTIZERS
from qat.spec import FLOAT, BatchNormMode, QuantSpec, Rule, Scheme


class Rules:
    """The rules of a scheme, and which of them found something.

    Args:
        scheme: Named rules in order.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.used: set[str] = set()
        self.seen: set[str] = set()
        self.effects = Effects(scheme)

    def patch(self, name: str, tags: frozenset[str], kind: str) -> dict[str, object] | None:
        """Merge what all matching rules say of ``kind``; ``None`` where it stays float."""
        merged: dict[str, object] | None = None
        self.seen.add(name)
        matching = [key for key, rule in self.scheme.rules.items() if rule.matches(name, tags)]
        self.used.update(matching)
        self.effects.record(matching, kind)
        for key in matching:
            change = getattr(self.scheme.rules[key], kind)
            if change == FLOAT:
                merged = None
            elif isinstance(change, Mapping):
                merged = {**(merged or {}), **change}
        return merged

    def check_all_used(self) -> None:
        """Refuse a rule that found nothing, unless it may.

        Raises:
            GraphError: If there is one, with names that are close.
        """
        for key in self.scheme.rules:
            if key not in self.used and not self.scheme.rules[key].optional:
                raise GraphError(self._unmatched(key, self.scheme.rules[key]))

    def _unmatched(self, key: str, rule: Rule) -> str:
        near = difflib.get_close_matches(rule.match.strip("*@"), sorted(self.seen), n=3, cutoff=0.3)
        return (
            f"expected rule '{key}' of scheme '{self.scheme.name}' to match a site, got none for "
            f"match='{rule.match}': correct the pattern (close names: "
            f"{', '.join(near) or 'none'}) or remove the rule."
        )


def weight_format(
    rules: Rules, name: str, module: nn.Module, tags: frozenset[str]
) -> Format | None:
    """Return the format of a layer's weight, ``None`` where it stays float.

    Args:
        rules: What applies.
        name: The layer's name.
        module: The layer.
        tags: The layer's tags.

    Raises:
        SpecError: If the format does not fit the weight.
    """
    patch = rules.patch(name, tags, "weight")
    if patch is None:
        return None
    if patch.get("axis") == 0:
        patch["axis"] = channel_axis(module)
    format_ = make_format(name, patch)
    try:
        format_.spec.scale_shape(weight_shape(name, module))
    except SpecError as error:
        raise SpecError(f"layer '{name}': {error}") from None
    return format_


def weight_shape(name: str, layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight.

    Raises:
        GraphError: If the layer computes its weight.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        raise GraphError(
            f"expected layer '{name}' to own its weight, got one that is computed in "
            f"{type(layer).__name__}: remove the parametrization, or leave the layer in float."
        )
    return tuple(weight.shape)


def make_format(name: str, patch: dict[str, object]) -> Format:
    """Return the format that the merged fields of rules describe.

    Args:
        name: The site's name, for messages.
        patch: Field to value.

    Raises:
        SpecError: If a field is missing, or two contradict each other.
    """
    values: dict[str, Any] = dict(patch)
    quantizer, observer = (values.pop(key, None) for key in ("quantizer", "observer"))
    if "bits" not in values or not quantizer or not observer:
        missing = [k for k in ("bits", "quantizer", "observer") if not patch.get(k)]
        raise SpecError(
            f"expected the rules to give bits, quantizer and observer for site '{name}', "
            f"got no {', '.join(missing)}: set them in the first rule."
        )
    try:
        word, options = _word(quantizer)
        if word not in QUANTIZERS:
            raise SpecError(
                f"expected one of {sorted(QUANTIZERS)} as quantizer, got {word!r}: correct it, or "
                "import the module that registers it (imports=[package.module] in a run, --allow "
                "package.module for a file)."
            )
        return Format(QuantSpec(**values), word, str(observer), options)
    except SpecError as error:
        raise SpecError(f"site '{name}': {error}") from None


def _word(quantizer: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of a quantizer and its options, which stand beside the name in a mapping."""
    if not isinstance(quantizer, Mapping):
        return str(quantizer), {}
    options: dict[str, Any] = dict(quantizer)
    if "name" not in options:
        raise SpecError(
            f"expected a quantizer's name, or a mapping with name and options, got {options}: "
            "add name."
        )
    return str(options.pop("name")), options


def batch_norm_mode(scheme: Scheme, spec: QuantSpec) -> BatchNormMode:
    """Only codes that can change sign, at a free scale, can take a batch-norm in afterwards."""
    movable = spec.symmetric and spec.signed and spec.narrow and not spec.power_of_two
    return scheme.batch_norm if movable else "folded"

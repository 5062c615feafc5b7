"""A model in the form that quantization-aware training takes: weights of its own, in float32.

Weights that are computed from others (weight norm, spectral norm, any parametrization, a pruning
mask) become plain ones of the same values; floats of other widths become float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qat.calls import Call
from qat.errors import GraphError
from qat.graph.captured import Captured
from qat.graph.trace import capture

log = logging.getLogger("qat")

_HOOKS = {
    WeightNorm: ("weight norm", remove_weight_norm),
    SpectralNorm: ("spectral norm", remove_spectral_norm),
    prune.BasePruningMethod: ("pruning mask", prune.remove),
}


@dataclass
class PlainModel:
    """A model in plain form, and what was done to bring it there.

    Attributes:
        model: The model itself where there was nothing to do, else a copy.
        notes: One sentence for each change.
        converted: Types of floats that became float32.
    """

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    converted: frozenset[torch.dtype] = frozenset()


def make_plain(model: nn.Module) -> PlainModel:
    """Return ``model`` with weights of its own, in float32; in evaluation it computes the same.

    Args:
        model: Any module; it stays as it is.

    Raises:
        GraphError: If a weight is complex.
    """
    computed, kinds = list(_computed_weights(model)), _other_floats(model)
    _check_real(model)
    with _leaves_only(model):
        if not computed and not kinds:
            return PlainModel(model)
        plain = deepcopy(model)
    notes = [_materialise(plain, *names) for names in computed]
    if kinds:
        plain.float()
        shown = ", ".join(sorted(str(kind)[6:] for kind in kinds))
        notes.append(f"weights and inputs of type {shown} were converted to float32")
    return PlainModel(plain, notes, frozenset(kinds))


def capture_plain(model: nn.Module, example: Any) -> tuple[Captured, PlainModel]:
    """Capture a copy of ``model`` in plain form; what was changed is logged.

    Args:
        model: Any module; it stays as it is.
        example: One batch, as ``capture`` takes it; floats of types that were converted are cast.

    Raises:
        GraphError: If a weight is complex, or the model cannot be traced.
    """
    plain = make_plain(model)
    for note in plain.notes:
        log.warning("%s", note)
    kinds = plain.converted
    call = Call.of(example).map(lambda x: x.float() if x.dtype in kinds else x)
    try:
        captured = capture(deepcopy(plain.model), call)
    except GraphError as error:
        if not kinds:
            raise
        raise GraphError(
            f"{error} Its weights were converted to float32 beforehand: where its code casts to "
            "another type, cast to the type of its weights."
        ) from error
    captured.converted = kinds
    return captured, plain


def _check_real(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if weight.is_complex():
            raise GraphError(
                f"expected weights of real numbers, got {str(weight.dtype)[6:]} in '{name}': write "
                "the model with real and imaginary parts."
            )


def _other_floats(model: nn.Module) -> set[torch.dtype]:
    tensors = [*model.parameters(), *model.buffers()]
    return {x.dtype for x in tensors if x.is_floating_point()} - {torch.float32}


def _computed_weights(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield module, attribute and method of every weight that is computed from others."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for kind, (method, _) in _HOOKS.items():
                if isinstance(hook, kind):
                    yield path, _hooked_name(hook), method
        if parametrize.is_parametrized(module):
            lists: Any = module.parametrizations
            for name, steps in lists.items():
                yield path, name, ", ".join(type(step).__name__.strip("_") for step in steps)


@torch.no_grad()
def _remove_parametrizations(module: nn.Module) -> None:
    """Give a module its own class back, with the values of what was computed.

    ``remove_parametrizations`` changes the class, which the user's model has, too.
    """
    kind = parametrize.type_before_parametrizations(module)
    found: Any = module._modules.pop("parametrizations")
    values = {name: steps() for name, steps in found.items()}
    module.__class__ = kind
    for name, value in values.items():
        raw = [*found[name].parameters(recurse=False)]
        if raw:
            is_trained = any(x.requires_grad for x in raw)
            setattr(module, name, nn.Parameter(value.clone(), is_trained))
        else:
            module.register_buffer(name, value.clone())


def _hooked_name(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name


def _materialise(model: nn.Module, path: str, name: str, method: str) -> str:
    """Give a module a plain weight of the value that it computes in evaluation; return a note."""
    module = model.get_submodule(path)
    modes = {m: m.training for m in module.modules()}
    module.eval()  # a spectral norm moves its vectors in training
    if parametrize.is_parametrized(module):
        _remove_parametrizations(module)
    elif name not in module._parameters:
        next(remove for word, remove in _HOOKS.values() if word == method)(module, name)
    for m, mode in modes.items():
        m.training = mode
    weight = f"{path}.{name}".removeprefix(".")
    return f"'{weight}' is trained as a plain weight, without its {method}; its values are the same"


@contextmanager
def _leaves_only(model: nn.Module) -> Iterator[None]:
    """Detach tensors that modules keep as attributes: a copy of a computed one is refused."""
    kept = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]
    try:
        for module, name, value in kept:
            module.__dict__[name] = value.detach()
        yield
    finally:
        for module, name, value in kept:
            module.__dict__[name] = value

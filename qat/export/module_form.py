"""Modules of a converted model as JSON, and modules of that form with the tensors of a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from qat.codecs import ActivationCodec, DynamicCodec, DynamicTensorCodec, Lookup, storage_type
from qat.errors import ExportError
from qat.export.allowed import ATTRIBUTE_OF, LARGEST, MODULES, MOST_LAYERS, OPTIONS
from qat.export.arguments import decode, encode
from qat.integer_layers import ChannelAffine, IntegerLayer, make_integer
from qat.spec import QuantSpec
from qat.subclass import original_class

BUFFERS = ("weight_codes", "weight_scale", "weight_zero_point")
BIASES = ("bias_codes", "bias_scale", "bias_float")
_COMPUTING = ("forward", "_conv_forward", "__call__")


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Return a module of a converted model as JSON, without its tensors.

    Raises:
        ExportError: If its class is none that a file may name; says which.
    """
    if isinstance(module, ActivationCodec | DynamicCodec | DynamicTensorCodec):
        ends = {"qmin": module.qmin, "qmax": module.qmax} if _is_static(module) else {}
        return {"type": type(module).__name__, "site": module.site, **_spec(module), **ends}
    if isinstance(module, ChannelAffine | Lookup):
        return {"type": type(module).__name__}
    if isinstance(module, IntegerLayer):
        if len(module._modules):
            raise ExportError("a layer inside a module that could not be traced")
        kind = _find_type(module, original_class(module))
        return {"type": kind, "options": _options(module, kind), **_spec(module)}
    kind = _find_type(module, type(module))
    return {"type": kind, "options": _options(module, kind)}


def _is_static(module: nn.Module) -> bool:
    return isinstance(module, ActivationCodec)


def _spec(module: Any) -> dict[str, Any]:
    values = ((f.name, getattr(module.spec, f.name), f.default) for f in fields(QuantSpec))
    return {"spec": {name: value for name, value, default in values if value != default}}


def _find_type(module: nn.Module, own: type[nn.Module]) -> str:
    """Return the name of the class of the list that computes what ``own`` does."""
    for kind in own.__mro__:
        if MODULES.get(kind.__name__) is kind:
            inherits = all(getattr(own, k, 0) is getattr(kind, k, 0) for k in _COMPUTING)
            if inherits and not any(True for _ in module.children()):
                return kind.__name__
            break
    raise ExportError(f"a module of class {own.__module__}.{own.__qualname__}")


def _options(module: nn.Module, kind: str) -> dict[str, Any]:
    """Return what the constructor of ``kind`` takes; modules keep it under the same names."""
    options: dict[str, Any] = {}
    for name in _option_names(kind):
        if name == "bias" and type(getattr(module, name)) is not bool:
            options[name] = not isinstance(module, IntegerLayer) and module.bias is not None
        elif hasattr(module, attribute := ATTRIBUTE_OF.get((MODULES[kind], name), name)):
            options[name] = encode(getattr(module, attribute))
    return options


def _option_names(kind: str) -> list[str]:
    names = OPTIONS.get(MODULES[kind]) or inspect.signature(MODULES[kind].__init__).parameters
    return [n for n in names if n not in ("self", "device", "dtype") and not n.startswith("_")]


def _check_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor; none that could take memory or another device."""
    for name in options.keys() - _option_names(kind):
        raise ExportError(f"an option '{name}' of {kind}")
    layers = options.get("num_layers", 1)
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ExportError(f"{kind} with {layers!r:.20} layers")
    return {name: decode(value, {}) for name, value in options.items()}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers of a float module by name."""
    own = {**module._parameters, **module._buffers}
    return {name: value.detach() for name, value in own.items() if value is not None}


def build_module(
    name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor], codes: Mapping[str, Any]
) -> nn.Module:
    """Return the module that ``describe_module`` described.

    Args:
        name: Its name.
        form: What ``describe_module`` returned.
        tensors: The tensors of the file, weights as codes of their own shape.
        codes: What the file's header says of its weights.

    Raises:
        ExportError: If the form is not one of ours, or tensors are missing or do not fit.
    """
    kind = form.get("type")
    special = _SPECIAL.get(str(kind))
    if special is not None:
        return special(name, form, tensors)
    if kind not in MODULES:
        raise ExportError(f"a module '{name}' of type {kind!r}")
    options = _check_options(kind, form["options"])
    with torch.device("meta"):
        module = MODULES[kind](**options)
    if "spec" in form:
        return _integer_layer(name, module, form, tensors, codes)
    for key, value in module_tensors(module).items():
        found = _tensor(tensors, f"{name}.{key}", tuple(value.shape))
        is_parameter = key in module._parameters
        stored = nn.Parameter(found, requires_grad=False) if is_parameter else found
        setattr(module, key, stored)  # recurrent modules keep a list of theirs
    return module.eval()


def _integer_layer(
    name: str,
    layer: nn.Module,
    form: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    codes: Mapping[str, Any],
) -> nn.Module:
    spec = QuantSpec(**form["spec"])
    weight = layer._parameters.get("weight")
    if weight is None or (codes[name]["bits"], codes[name]["signed"]) != (spec.bits, spec.signed):
        raise ExportError(f"another format of the weight of '{name}'")
    shape, storage = tuple(weight.shape), storage_type(spec, signed=spec.signed)
    layer._parameters.clear()
    found = _tensor(tensors, f"{name}.weight", shape)
    scale = _tensor(tensors, f"{name}.weight_scale")
    zero_point = _tensor(tensors, f"{name}.weight_zero_point", tuple(scale.shape))
    _check_grid(name, scale, zero_point, storage)
    parts = (found * spec.storage_gain, scale / spec.storage_gain, zero_point.to(storage))
    buffers: dict[str, Tensor | None] = dict(zip(BUFFERS, parts, strict=True))
    buffers["weight_codes"] = parts[0].to(storage)
    buffers.update({key: tensors.get(f"{name}.{key}") for key in BIASES})
    axis, block = (_index(codes[name][key], len(shape)) for key in ("axis", "block"))
    make_integer(layer, spec, axis, block, buffers)
    return layer.eval()


def _check_grid(name: str, scale: Tensor, zero_point: Tensor, storage: torch.dtype) -> None:
    """Refuse scales that are no floats, and zero points that their type does not hold."""
    ends = torch.iinfo(storage)
    is_whole = not zero_point.is_floating_point()
    fits = is_whole and bool(((zero_point >= ends.min) & (zero_point <= ends.max)).all())
    if not fits or not scale.is_floating_point():
        raise ExportError(f"another grid of the weight of '{name}'")


def _index(value: Any, rank: int) -> int:
    """Return an axis or a block size."""
    if type(value) is not int or not 0 <= value < LARGEST or rank == 0:
        raise ExportError(f"an axis or block {value!r}")
    return value


def _activation_codec(
    name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ActivationCodec:
    del name
    site = form["site"]
    scale, zero_point = (_tensor(tensors, f"{site}.{k}", ()) for k in ("scale", "zero_point"))
    spec = QuantSpec(**form["spec"])
    highest = torch.iinfo(storage_type(spec, signed=False)).max
    ends = (form["qmin"], form["qmax"])
    if not all(type(end) is int and 0 <= end <= highest for end in ends) or ends[0] > ends[1]:
        raise ExportError(f"codes {ends} at site '{site}'")
    if zero_point.is_floating_point() or not 0 <= int(zero_point) <= highest:
        raise ExportError(f"a zero point {int(zero_point)} at site '{site}'")
    if not scale.is_floating_point() or float(scale) == 0:
        raise ExportError(f"a scale {float(scale)} at site '{site}'")
    return ActivationCodec(site, spec, scale, zero_point, *ends)


def _dynamic_codec(
    name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> DynamicCodec:
    del name, tensors
    return DynamicCodec(form["site"], QuantSpec(**form["spec"]))


def _dynamic_tensor_codec(
    name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> DynamicTensorCodec:
    del name, tensors
    return DynamicTensorCodec(form["site"], QuantSpec(**form["spec"]))


def _channel_affine(
    name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ChannelAffine:
    del form
    return ChannelAffine(_tensor(tensors, f"{name}.gain"), _tensor(tensors, f"{name}.shift"))


def _lookup(name: str, form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Lookup:
    del form
    return Lookup(_tensor(tensors, f"{name}.thresholds"), _tensor(tensors, f"{name}.values"))


_SPECIAL: dict[str, Callable[..., nn.Module]] = {
    "ActivationCodec": _activation_codec,
    "DynamicCodec": _dynamic_codec,
    "DynamicTensorCodec": _dynamic_tensor_codec,
    "ChannelAffine": _channel_affine,
    "Lookup": _lookup,
}


def _tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None = None
) -> Tensor:
    if name not in tensors:
        raise ExportError(f"no tensor '{name}'")
    found = tensors[name]
    if shape is not None and tuple(found.shape) != shape:
        raise ExportError(f"a tensor '{name}' of shape {tuple(found.shape)} instead of {shape}")
    return found

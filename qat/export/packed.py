"""The artifact for PyTorch: integer weights, scales and zero points in one safetensors file.

Codes narrower than 8 bits are packed, lowest bits first, into bytes. The header describes each
weight (bits, signed, shape, axis, block), each activation (bits, lowest and highest code; those
that are dynamic have no scale) and the graph that computes with them (``graph_form.py``) under the
key ``qat``, as JSON, with a checksum over all of it. Nothing in the file is code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat.codecs import ActivationCodec, DynamicCodec, DynamicTensorCodec
from qat.errors import ExportError
from qat.export.allowed import DTYPES, LARGEST
from qat.export.checksum import FORMAT_KEY, KEY
from qat.export.form import CALL, describe_call, read_call, tensors_of
from qat.export.graph_form import build_graph, called_modules, describe_graph, graph_tensors
from qat.export.module_form import module_tensors
from qat.export.packed_file import (
    check_packed,
    damage_named,
    pack_bits,
    pack_file,
    read_file,
    unpack_bits,
)
from qat.export.packed_graph import PackedGraph
from qat.files import write_bytes
from qat.integer_layers import IntegerLayer

log = logging.getLogger("qat")
FORMS = ("weights", "activations", "graph", "no_graph", "input", CALL, KEY, FORMAT_KEY)
"""What the header holds beside the metadata that the caller gave."""


def save_packed(
    model: fx.GraphModule, example: Any, path: Path, *, metadata: Mapping[str, object]
) -> None:
    """Write a converted model's integers and its graph to ``path``.

    A graph with an operation that no file may name is left out, with a warning that says which;
    the header keeps the reason.

    Args:
        model: What ``qat.graph.convert`` returned.
        example: One batch as the model takes it: a tensor ``(N, ...)``, a tuple of arguments, or a
            mapping of arguments by name.
        path: The ``.safetensors`` file to write.
        metadata: More to store in the header, as JSON.

    Raises:
        ExportError: If an argument or output beside the tensors has no form in JSON.
        GraphError: If the model was captured with another form of call than the example.
    """
    first = tensors_of(model, example)[0]
    tensors, forms = _pack(model)
    if forms["no_graph"]:
        log.warning("%s holds no graph: %s", path.name, forms["no_graph"])
    forms["input"] = {"shape": [*first.shape[1:]], "dtype": str(first.dtype)[6:]}
    write_bytes(path, pack_file(tensors, {**metadata, **forms}))


def first_packed_difference(model: fx.GraphModule, path: Path) -> str | None:
    """Return the first tensor or entry in which a packed file differs from ``model``, if any.

    Args:
        model: What ``qat.graph.convert`` returned.
        path: The ``.safetensors`` file.

    Raises:
        ExportError: If the file is missing, damaged or not one of ours.
    """
    expected, forms = _pack(model)
    with damage_named(path):
        found, header = read_file(path)
    for key, value in expected.items():
        if key not in found or found[key].dtype != value.dtype or not _equal(found[key], value):
            return key
    names = [*sorted(found.keys() - expected.keys())]
    names += [kind for kind, form in forms.items() if header.get(kind) != form]
    return names[0] if names else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _pack(model: fx.GraphModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file by name, and what its header says of their formats."""
    tensors = _float_tensors(model)
    weights: dict[str, dict[str, Any]] = {}
    activations: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, IntegerLayer):
            weights[name] = _add_layer(tensors, name, module)
        elif isinstance(module, ActivationCodec):
            tensors[f"{module.site}.scale"] = module.scale
            tensors[f"{module.site}.zero_point"] = module.zero_point.to(torch.int32)
            form = {"bits": module.spec.bits, "qmin": module.qmin, "qmax": module.qmax}
            activations.setdefault(module.site, form)  # a clipped one of the same site comes later
        elif isinstance(module, DynamicCodec | DynamicTensorCodec):
            form = {"bits": module.spec.bits, "qmin": module.spec.qmin, "qmax": module.spec.qmax}
            shares = "token" if isinstance(module, DynamicCodec) else "tensor"
            activations[module.site] = {**form, "dynamic": shares}
    form = describe_call(model)
    call = {CALL: form} if form else {}
    return tensors, {"weights": weights, "activations": activations, **_describe(model), **call}


def _float_tensors(model: fx.GraphModule) -> dict[str, Tensor]:
    """Return what stays float: all that layers and sites do not write themselves."""
    handled = {m for m in model.modules() if isinstance(m, IntegerLayer | ActivationCodec)}
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if model.get_submodule(name.rpartition(".")[0]) not in handled
    }
    for module, name in called_modules(model).items():
        if module not in handled:  # views share theirs with the model, which leaves them out
            tensors.update({f"{name}.{k}": v.clone() for k, v in module_tensors(module).items()})
    return {**tensors, **{name: value.clone() for name, value in graph_tensors(model).items()}}


def _describe(model: fx.GraphModule) -> dict[str, Any]:
    try:
        return {"graph": describe_graph(model), "no_graph": None}
    except ExportError as error:
        return {"graph": None, "no_graph": str(error)}


def _add_layer(tensors: dict[str, Tensor], name: str, layer: IntegerLayer) -> dict[str, Any]:
    spec = layer.spec
    codes = layer.weight_codes.to(torch.int32) // spec.storage_gain
    tensors[f"{name}.weight"] = pack_bits(codes, spec.bits)
    tensors[f"{name}.weight_scale"] = layer.weight_scale * spec.storage_gain
    tensors[f"{name}.weight_zero_point"] = layer.weight_zero_point.to(torch.int32)
    for key in ("bias_codes", "bias_scale", "bias_float"):
        value = layer._buffers[key]
        if value is not None:
            tensors[f"{name}.{key}"] = value
    return {
        "bits": spec.bits,
        "signed": spec.signed,
        "shape": list(codes.shape),
        "axis": layer.axis,
        "block": layer.block,
    }


def load_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return name to tensor, with weights as int32 codes of their own shape, and the header.

    Raises:
        ExportError: If the file is missing, damaged or not one of ours.
    """
    with damage_named(path):
        tensors, header = read_file(path)
        for name, form in header["weights"].items():
            key, shape = f"{name}.weight", tuple(form["shape"])
            check_packed(tensors[key], key, form["bits"], shape)
            tensors[key] = unpack_bits(tensors[key], form["bits"], shape, signed=form["signed"])
    return tensors, header


def holds_graph(path: Path) -> bool:
    """Whether a file can be loaded as a model.

    Raises:
        ExportError: If it is missing, damaged or not one of ours.
    """
    with damage_named(path):
        return read_file(path)[1].get("graph") is not None


def load_model(path: Path) -> tuple[PackedGraph, dict[str, Any]]:
    """Return the converted model that a file holds, in eval mode, and the file's header.

    Its layers hold codes of 8 bits and more as integers of that width, narrower ones as int8; no
    code of the model that was trained is needed, and none comes out of the file.

    Raises:
        ExportError: If the file is missing, damaged or not one of ours, or has no graph.
    """
    tensors, header = load_packed(path)
    if header.get("graph") is None:
        reason = header.get("no_graph") or "it was written before files had one: export it again."
        raise ExportError(f"expected a packed model with its graph at '{path}', got none: {reason}")
    with damage_named(path):
        _check_input(header["input"])
        graph = build_graph(header["graph"], tensors, header["weights"])
        signature, outputs = read_call(header.get(CALL)) or (None, None)
        graph.meta = {"signature": signature, "outputs": outputs}
        return graph, header


def _check_input(form: Any) -> None:
    sizes = form["shape"]
    are_sizes = isinstance(sizes, list) and all(type(n) is int and 0 < n < LARGEST for n in sizes)
    if not are_sizes or not isinstance(form["dtype"], str) or form["dtype"] not in DTYPES:
        raise ExportError(f"an input {form!r:.200}")

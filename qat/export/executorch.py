"""ExecuTorch: a converted model as a ``.pte`` file for XNNPACK's integer kernels, on phones too.

XNNPACK takes int8 activations with a scale for each tensor and symmetric int8 weights with one for
each channel, and its kernels write codes: a layer whose result nothing quantizes, such as a
classifier, stays float. Codes of activations are those of ``model.onnx`` less 128.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat.codecs import ActivationCodec
from qat.errors import ExportError
from qat.export.decomposed import decompose, float_layers
from qat.export.quiet import quiet
from qat.integer_layers import IntegerLayer

log = logging.getLogger("qat")
METADATA = "metadata"
"""The method of the file that returns what the exporter stored."""


def load_package(*names: str) -> list[Any]:
    """Import modules of executorch.

    Raises:
        ExportError: If it is not installed.
    """
    try:
        with quiet():
            return [import_module(f"executorch.{name}") for name in names]
    except ImportError as error:
        raise ExportError(
            f"expected the package executorch for .pte files, got none ({error}): install it with "
            "pip install 'qat[executorch]'."
        ) from error


def export_executorch(
    model: fx.GraphModule, example: Tensor, path: Path, *, metadata: Mapping[str, object]
) -> list[str]:
    """Write a converted model to ``path``, for one sample at a time; it ran once before.

    Args:
        model: What ``qat.graph.convert`` returned, or ``PackedModel.graph_module``.
        example: One batch as the model takes it, ``(N, ...)``.
        path: The ``.pte`` file to write.
        metadata: Names and values to store in the file, as JSON.

    Returns:
        The layers that compute on integers.

    Raises:
        ExportError: If executorch is not installed, a site has no form in XNNPACK, or the model
            cannot be lowered or run; says which and why. Nothing is written then.
    """
    load_package("runtime", "kernels.quantized")
    in_float = _check(model)
    facts = {**metadata, "input_shape": [*example.shape[1:]]}
    twin = decompose(model, signed=True, codes_out=True)
    _separate_readers(twin)
    try:
        with quiet(), torch.no_grad():
            content = _lower(twin, example[:1], json.dumps(facts))
            _run_once(content, example[:1])
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ExportError(
            f"expected a model that ExecuTorch lowers to XNNPACK and runs, got "
            f"{type(error).__name__}: {reason}: use model.onnx, or another version of executorch."
        ) from error
    path.write_bytes(content)
    layers = [name for name, m in model.named_modules() if isinstance(m, IntegerLayer)]
    return [name for name in layers if name not in in_float]


def _check(model: fx.GraphModule) -> dict[str, str]:
    """Return the layers that stay float, with reasons; raise for what has no form at all."""
    for module in model.modules():
        if isinstance(module, ActivationCodec) and module.spec.bits > 8:
            raise ExportError(
                f"expected activations of at most 8 bits for XNNPACK, got {module.spec.bits} at "
                f"site '{module.site}': use 8 bits there, or float."
            )
    reasons = float_layers(model, codes_out=True)
    layers = [name for name, m in model.named_modules() if isinstance(m, IntegerLayer)]
    if reasons and len(reasons) == len(layers):
        site, reason = next(iter(reasons.items()))
        raise ExportError(
            f"expected layers that XNNPACK has integer kernels for, got {len(layers)} that it has "
            f"none for, first '{site}': {reason}: use another runtime."
        )
    for site, reason in reasons.items():
        log.warning("XNNPACK computes '%s' in float: %s", site, reason)
    return reasons


def _separate_readers(model: fx.GraphModule) -> None:
    """Quantize once more, to the same codes, for every further reader of a site.

    Otherwise ExecuTorch 1.5 cannot lower a site that is read inside and outside of XNNPACK
    (KeyError: 'val'), or finds cycles in what it cuts out of a network with residual additions.
    """
    graph, ops = model.graph, torch.ops.quantized_decomposed
    for node in list(graph.nodes):
        if node.target is not ops.dequantize_per_tensor.default:
            continue
        codes, *form = node.args
        for reader in list(node.users)[1:]:
            with graph.inserting_after(node):
                again = graph.call_function(codes.target, (node, *form))
            with graph.inserting_after(again):
                value = graph.call_function(node.target, (again, *form))
            reader.replace_input_with(node, value)
    model.recompile()


def _lower(model: fx.GraphModule, example: Tensor, facts: str) -> bytes:
    exir, xnnpack = load_package("exir", "backends.xnnpack.partition.xnnpack_partitioner")
    program = torch.export.export(model, (example,))
    edge = exir.to_edge_transform_and_lower(
        program,
        partitioner=[xnnpack.XnnpackPartitioner()],
        constant_methods={METADATA: facts},
    )
    return edge.to_executorch().buffer


def _run_once(content: bytes, example: Tensor) -> None:
    (runtime,) = load_package("runtime")
    runtime.Runtime.get().load_program(content).load_method("forward").execute([example])

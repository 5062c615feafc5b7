"""ONNX: a converted model as a Quantize/Dequantize file with integer initialisers.

``torch.onnx.export`` writes the file; this module only says what our two operators mean there.
Narrow activations are clipped behind QuantizeLinear, on integers: a float clip in front, or an
int8 activation, keeps onnxruntime from forming integer convolutions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir.passes.common as passes
import onnxscript.optimizer
import torch
from onnxscript import ir, opset21
from torch import Tensor, fx

from qat.errors import ExportError, reason
from qat.export.conversion_error import without_form
from qat.export.dynamic import suit_dynamic_kernels
from qat.export.form import CALL, describe_call, input_names, output_names, tensors_of
from qat.export.onnx_file import PRODUCER, write_onnx
from qat.export.onnx_forms import FORMS
from qat.export.quiet import quiet
from qat.export.sites import SUFFIX, call_order
from qat.export.storage import Storage, store_in_four_bits
from qat.export.workarounds import respect_limits
from qat.outputs import ONE_OUTPUT, Outputs
from qat.signature import ONE_INPUT, Signature, interface

OPSET = 21
op: Any = opset21
INPUT, OUTPUT = ONE_INPUT, ONE_OUTPUT
_FULL_RANGE = {ir.DataType.UINT8: (0, 255), ir.DataType.UINT16: (0, 65535)}
"""Of the codes of activations, which are stored without a sign."""


def _quantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int) -> Any:
    kind = zero_point.dtype
    if (qmin, qmax) == _FULL_RANGE[kind]:
        return op.QuantizeLinear(x, scale, zero_point)
    if kind.bitwidth > 8:  # onnxruntime cannot clip 16-bit integers
        zero = op.Cast(zero_point, to=ir.DataType.FLOAT)
        ends = (op.Constant(value_float=float(v)) for v in (qmin, qmax))
        low, high = (op.Mul(op.Sub(end, zero), scale) for end in ends)
        return op.QuantizeLinear(op.Clip(x, low, high), scale, zero_point)
    low, high = (op.Constant(value=ir.tensor(v, dtype=kind)) for v in (qmin, qmax))
    return op.Clip(op.QuantizeLinear(x, scale, zero_point), low, high)


def _look_up(x: Any, thresholds: Any, values: Any) -> Any:
    """Count the thresholds that were reached, along a new first axis."""
    behind = op.Constant(value_ints=[*range(1, 1 + len(x.shape))])
    reached = op.GreaterOrEqual(x, op.Unsqueeze(thresholds, behind))
    first = op.Constant(value_ints=[0])
    return op.Gather(
        values, op.ReduceSum(op.Cast(reached, to=ir.DataType.INT32), first, keepdims=0)
    )


def _quantize_dynamic(x: Any) -> Any:
    return op.DynamicQuantizeLinear(x)


def _dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
    options = {"block_size": block} if block else {}
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis, **options)


def _mean(x: Any, dim: Any, keepdim: bool = False, dtype: int | None = None) -> Any:
    """Average over images as the operator that runtimes have an integer kernel for."""
    rank = len(x.shape)
    if rank == 4 and {d % rank for d in dim} == {2, 3} and dtype is None:
        y = op.GlobalAveragePool(x)
        return y if keepdim else op.Squeeze(y, op.Constant(value_ints=[2, 3]))
    y = op.ReduceMean(x, op.Constant(value_ints=list(dim)), keepdims=keepdim)
    return y if dtype is None else op.Cast(y, to=dtype)


def export_onnx(
    model: fx.GraphModule,
    example: Any,
    path: Path,
    *,
    metadata: Mapping[str, object] | None = None,
    storage: Storage = "speed",
) -> list[str]:
    """Write a converted model to ``path``; its batch axis is dynamic.

    Args:
        model: What ``qat.graph.convert`` returned.
        example: One batch as the model takes it: a tensor ``(N, ...)``, a tuple of arguments, or a
            mapping of arguments by name.
        path: The file to write.
        metadata: Names and values to store in the file, as JSON.
        storage: ``"speed"``: weights in 8 bits, for integer kernels; ``"size"``: those of at most
            4 bits in 4, for layers in float.

    Returns:
        For every quantize in the order of the file, its site; ``<site>:codes`` is the name of
        the tensor of codes that it makes.

    Raises:
        ExportError: If an operation of the model has no form in ONNX, or the file is not valid.
        GraphError: If the model was captured with another form of call than the example.
    """
    form = describe_call(model)
    proto = _translate(model.eval(), example, storage)
    _name_outputs(proto, output_names(*interface(model)))
    respect_limits(proto)
    del proto.metadata_props[:]
    facts = {**(metadata or {}), **({CALL: form} if form else {})}
    for key, value in facts.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    sites = _name_codes(proto, model)
    proto.producer_name = PRODUCER
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"expected a valid ONNX model for '{Path(path).name}', got {reason(error)}: replace "
            "the operation, or train with target=simulation, which writes no file."
        ) from error
    write_onnx(path, proto)
    return sites


def _translate(model: fx.GraphModule, example: Any, storage: Storage) -> onnx.ModelProto:
    signature, outputs = interface(model)
    tensors, shapes = _double(tensors_of(model, example), signature)
    returning = _of_tensors(model, outputs)
    table: dict[Any, Any] = {
        **FORMS,
        torch.ops.qat.quantize.default: _quantize,
        torch.ops.qat.quantize_dynamic.default: _quantize_dynamic,
        torch.ops.qat.lookup.default: _look_up,
        torch.ops.qat.dequantize.default: _dequantize,
        torch.ops.aten.mean.dim: _mean,
    }
    with quiet():
        try:
            program = torch.onnx.export(
                returning,
                tensors,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=input_names(signature),
                output_names=output_names(signature, outputs),
                custom_translation_table=table,
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise without_form(error, model) from error
    assert program is not None
    graph = program.model.graph
    suit_dynamic_kernels(graph)
    if storage == "size":
        store_in_four_bits(graph, model)
    _simplify(program.model)
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for item in [graph, *graph.all_nodes(), *values]:
        item.metadata_props.clear()  # stack traces and paths of the exporting machine
    return program.model_proto


def _double(
    tensors: Sequence[Tensor], signature: Signature | None
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Return inputs of twice the samples, and the axes that may have any length."""
    batch = torch.export.Dim("batch")
    many = [x.has_batch for x in signature.inputs] if signature else [True for _ in tensors]
    pairs = [*zip(tensors, many, strict=True)]
    # a batch of one would be taken for a constant
    doubled = tuple(torch.cat([x, x]) if has_batch else x for x, has_batch in pairs)
    return doubled, tuple({0: batch} if has_batch else {} for has_batch in many)


def _of_tensors(model: fx.GraphModule, outputs: Outputs | None) -> fx.GraphModule:
    """Return a model whose graph returns nothing but tensors.

    Raises:
        ExportError: If it returns a number that depends on its inputs.
    """
    if outputs is None or len(outputs.tensors) == len(outputs.leaves):
        return model
    graph = fx.Graph()
    values: Any = graph.graph_copy(model.graph, {})
    pairs = [*zip(outputs.leaves, values, strict=True)]
    for leaf, value in pairs:
        if leaf.shape is None and isinstance(value, fx.Node):
            raise ExportError(
                f"expected tensors and constants as the outputs of the model, got '{leaf.name}', "
                "a number that depends on the inputs: leave it out."
            )
    graph.output(tuple(value for leaf, value in pairs if leaf.shape is not None))
    return fx.GraphModule(model, graph, class_name="IntegerModel")


def _name_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give every output its own name: the exporter has one for a tensor that is returned twice."""
    for output, name in zip(proto.graph.output, names, strict=True):
        if output.name != name:
            proto.graph.node.append(onnx.helper.make_node("Identity", [output.name], [name]))
            output.name = name


def _simplify(model: ir.Model) -> None:
    """Fold constants, and nothing that would merge or move operators: runtimes do that."""
    onnxscript.optimizer.fold_constants(model)
    for change in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
    ):
        change(model)


def _name_codes(proto: onnx.ModelProto, model: fx.GraphModule) -> list[str]:
    """Name the codes after their sites; the file keeps the order in which the codecs ran."""
    sites = call_order(model)
    quantizes = [n for n in proto.graph.node if n.op_type.endswith("QuantizeLinear")]
    if len(quantizes) != len(sites):
        raise ExportError(
            f"expected a QuantizeLinear in the file for each of the {len(sites)} quantizes of the "
            f"model, got {len(quantizes)}: the exporter merged or lost some; report the model."
        )
    renamed: dict[str, str] = {}
    for node, site in zip(quantizes, sites, strict=True):
        clip = [n for n in proto.graph.node if n.op_type == "Clip" and n.input[0] == node.output[0]]
        renamed[(clip or [node])[0].output[0]] = f"{site}{SUFFIX}"
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    for info in proto.graph.value_info:
        info.name = renamed.get(info.name, info.name)
    return sites

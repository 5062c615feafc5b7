"""What a file says of how its model is called and what it returns, as JSON.

Nothing is said of a model that takes one tensor by position and returns one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qat.calls import Call
from qat.errors import ExportError
from qat.export.allowed import DTYPES, LARGEST
from qat.functional.affine import full_precision
from qat.outputs import ONE_OUTPUT, Output, Outputs
from qat.signature import ONE_INPUT, Input, Signature, interface
from qat.trees import Path, is_plain, name_of

CALL = "call"
"""The entry of a file's metadata."""
_MOST = 4096


def describe_call(model: nn.Module) -> dict[str, Any] | None:
    """Return the calling convention of a converted model as JSON; None for one tensor to one.

    Raises:
        ExportError: If a constant among arguments or outputs is no number or text.
    """
    signature, outputs = interface(model)
    if signature is None or outputs is None or (signature.is_plain and outputs.is_alone):
        return None
    return {
        "parameters": [*signature.parameters],
        "inputs": [
            {
                "path": [*x.path],
                "shape": [*x.shape],
                "dtype": str(x.dtype)[6:],
                "batch": x.has_batch,
            }
            for x in signature.inputs
        ],
        "constants": [[[*path], _plain(path, x)] for path, x in signature.constants.items()],
        "outputs": [_describe_output(x) for x in outputs.leaves],
        "prediction": signature.prediction,
    }


def _describe_output(x: Output) -> dict[str, Any]:
    if x.shape is None:
        return {"path": [*x.path], "value": _plain(x.path, x.value)}
    return {"path": [*x.path], "shape": [*x.shape], "batch": x.has_batch, "real": x.is_real}


def _plain(path: Path, value: Any) -> Any:
    if not is_plain(value):
        raise ExportError(
            "expected numbers and texts beside the tensors of a model's arguments and outputs, got "
            f"{value!r:.40} at '{name_of(path)}': leave it out."
        )
    return value


def read_call(form: Any) -> tuple[Signature, Outputs] | None:
    """Return the calling convention that ``describe_call`` described.

    Raises:
        ExportError: If it is of another form.
    """
    if form is None:
        return None
    try:
        inputs = [
            Input(_path(x["path"]), _sizes(x["shape"]), DTYPES[x["dtype"]], bool(x["batch"]))
            for x in _few(form["inputs"])
        ]
        parameters = [_name(name) for name in _few(form["parameters"])]
        constants = {_path(path): _constant(x) for path, x in _few(form["constants"])}
        outputs = Outputs(map(_read_output, _few(form["outputs"])))
        prediction = form["prediction"]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ExportError(f"a call {form!r:.200}") from error
    _check(inputs, outputs, prediction)
    signature = Signature(parameters, inputs, constants)
    signature.prediction = prediction
    return signature, outputs


def _check(inputs: list[Input], outputs: Outputs, prediction: Any) -> None:
    """Refuse leaves that stand inside each other, or a prediction that is none of them."""
    for paths in ({x.path for x in inputs}, {x.path for x in outputs.leaves}):
        inner = {path[:i] for path in paths for i in range(len(path))}
        if inner & paths:
            raise ExportError("a leaf inside another")
    lengths = [len({x.path for x in part}) for part in (inputs, outputs.leaves)]
    if not inputs or not outputs.tensors or lengths != [len(inputs), len(outputs.leaves)]:
        raise ExportError("a call without tensors, or with one twice")
    if prediction is not None and prediction not in [x.name for x in outputs.tensors]:
        raise ExportError(f"a prediction {prediction!r:.100}")


def _read_output(form: Mapping[str, Any]) -> Output:
    path = _path(form["path"])
    if "shape" not in form:
        return Output(path, None, value=_constant(form["value"]))
    return Output(path, _sizes(form["shape"]), bool(form["batch"]), bool(form["real"]))


def _few(values: Any) -> list[Any]:
    if not isinstance(values, list) or len(values) > _MOST:
        raise TypeError
    return values


def _path(keys: Any) -> Path:
    if not all(isinstance(k, str) or (type(k) is int and 0 <= k < _MOST) for k in _few(keys)):
        raise TypeError
    return tuple(keys)


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError
    return name


def _sizes(sizes: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < LARGEST for n in _few(sizes)):
        raise TypeError
    return tuple(sizes)


def _constant(value: Any) -> Any:
    if not is_plain(value):
        raise TypeError
    return value


def input_names(signature: Signature | None) -> list[str]:
    """Return what a file calls its inputs: the parameters' names, or ``input`` of the only one."""
    if signature is None or signature.is_plain:
        return [ONE_INPUT]
    return [x.name for x in signature.inputs]


def output_names(signature: Signature | None, outputs: Outputs | None) -> list[str]:
    """Return what a file calls its outputs; one named like an input has ``output.`` in front."""
    if outputs is None:
        return [ONE_OUTPUT]
    taken = input_names(signature)
    return [f"{ONE_OUTPUT}.{x.name}" if x.name in taken else x.name for x in outputs.tensors]


def tensors_of(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the tensors of a batch in the order in which the graph takes them, reals as float32.

    Raises:
        GraphError: If the batch has another form than the model was captured with.
    """
    signature, call = interface(model)[0], Call.of(batch)
    found = call.tensors if signature is None else signature.flatten(call.args, call.kwargs)
    return [full_precision(x) for x in found]

"""Run a packed file in PyTorch: a module of integers, as exact as the integer reference.

No training code takes part: no fake-quant, no checkpoint, not the class of the trained model. The
file is not trusted: what runs is an interpreter over operations of a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.calls import Call
from qat.errors import ExportError, reason
from qat.export.allowed import DTYPES
from qat.export.calls import CheckedCalls
from qat.export.form import tensors_of
from qat.export.packed import FORMS, load_model
from qat.export.packed_graph import PackedGraph, to_graph_module
from qat.functional.affine import full_precision
from qat.memory import available
from qat.outputs import Outputs
from qat.reference.run import IntegerRun
from qat.signature import Signature, interface
from qat.trees import is_plain, leaves


class PackedModel(nn.Module):
    """A ``.safetensors`` file as a module; call it like the model that it was made of.

    It returns what the model returns, with dictionaries in place of its own classes.

    Sums are exact integers, rounded once where the next quantize reads them, so codes and
    predictions are the converted model's and, up to float operations, onnxruntime's.

    Args:
        path: The file.
        threads: Threads that PyTorch may use from now on in this process; None leaves them.

    Attributes:
        packed: The graph of the file, whose own ``forward`` simulates the integers in float.

    Raises:
        ExportError: If the file is missing, damaged or not one of ours, or has no graph.
    """

    package = "torch"
    suffix = ".safetensors"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.packed, self.header = load_model(self.path)
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def signature(self) -> Signature | None:
        """How it is called; None of a file that does not say: one tensor."""
        return interface(self.packed)[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns for one call, such as logits ``(N, K)``.

        Args:
            *args: Tensors ``(N, ...)``, real values or integers, or trees of them.
            **kwargs: The same by name.

        Raises:
            ExportError: If the graph cannot run on it, or would take more memory than is free.
            GraphError: If the model took other arguments.
        """
        call = Call(args, kwargs).map(full_precision)
        tensors = tensors_of(self.packed, call)
        try:
            self.packed.check_inputs(tuple(tensors))
            result = call.on_copies(_IntegerRun(self.packed))  # the graph may write into them
            self.packed.check_unchanged()
            _check_tensors(result, interface(self.packed)[1])
        except Exception as error:  # a graph of a file raises whatever torch raises
            raise self._refused(tensors, reason(error)) from error
        return result

    def _refused(self, tensors: Sequence[Tensor], reason: str) -> ExportError:
        signature = self.signature
        wanted = f"of shape {(-1, *self.input_shape)}" if signature is None else signature.shown
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        return ExportError(
            f"expected a graph in '{self.path}' that runs on inputs of shape {shapes}, got "
            f"{reason}: give it inputs {wanted}, or export it again."
        )

    @property
    def graph_module(self) -> fx.GraphModule:
        """The same graph as source, for compilers and exporters; simulates the integers in float.

        Its names are numbers: none comes out of the file.
        """
        return to_graph_module(self.packed)[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the exporter stored: class names, normalisation, scheme, versions."""
        return {key: value for key, value in self.header.items() if key not in FORMS}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample of the first input, without the batch axis."""
        return tuple(self.header["input"]["shape"])

    def example(self) -> Tensor:
        """Return a batch of one as the model takes it, all zeros, ``(1, ...)``.

        Raises:
            ExportError: If it would not fit in memory.
        """
        dtype = DTYPES[self.header["input"]["dtype"]]
        if math.prod(self.input_shape) * dtype.itemsize > available():
            raise ExportError(
                f"expected an input of '{self.path}' that fits in memory, got {self.input_shape}: "
                "export it again."
            )
        return torch.zeros(1, *self.input_shape, dtype=dtype)


def _check_tensors(result: Any, outputs: Outputs | None) -> None:
    """Refuse an output that is more than tensors and the constants that the file lists."""
    found = [leaf for _, leaf in leaves(result)]
    constants = (
        [False] * len(found) if outputs is None else [x.shape is None for x in outputs.leaves]
    )
    for leaf, is_constant in zip(found, constants, strict=True):
        if not isinstance(leaf, Tensor) and not (is_constant and is_plain(leaf)):
            raise ExportError(f"{type(leaf).__name__} instead of a tensor as its output")


class _IntegerRun(CheckedCalls, IntegerRun):
    """The integer reference on the graph of a file."""

    def __init__(self, model: PackedGraph) -> None:
        super().__init__(model)
        self.look_up(model.modules_by_name, model.constants)

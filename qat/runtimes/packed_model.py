"""Run a packed file in PyTorch: a module of integers, as exact as the integer reference.

No training code takes part: no fake-quant, no checkpoint, not the class of the trained model. The
file is not trusted: what runs is an interpreter over operations of a list.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.errors import ExportError, reason
from qat.export.allowed import DTYPES
from qat.export.calls import CheckedCalls
from qat.export.packed import FORMS, load_model
from qat.export.packed_graph import PackedGraph, to_graph_module
from qat.functional.affine import full_precision
from qat.memory import available
from qat.reference.run import IntegerRun


class PackedModel(nn.Module):
    """A ``.safetensors`` file as a module; call it with a batch to get the logits.

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

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of one batch ``(N, ...)``, real values.

        Raises:
            ExportError: If the graph cannot run on it, or would take more memory than is free.
        """
        x = full_precision(x)
        try:
            self.packed.check_inputs((x,))
            logits = _IntegerRun(self.packed)(x.clone())  # the graph may write into it
            self.packed.check_unchanged()
            _check_tensors(logits)
        except Exception as error:  # a graph of a file raises whatever torch raises
            raise self._refused(x, reason(error)) from error
        return logits

    def _refused(self, x: Tensor, reason: str) -> ExportError:
        return ExportError(
            f"expected a graph in '{self.path}' that runs on inputs of shape {tuple(x.shape)}, got "
            f"{reason}: give it inputs of shape {(-1, *self.input_shape)}, "
            "or export it again."
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
        """Shape of one sample, without the batch axis."""
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


def _check_tensors(value: Any) -> None:
    """Refuse an output that is more than tensors."""
    if isinstance(value, tuple | list):
        for part in value:
            _check_tensors(part)
    elif isinstance(value, dict):
        _check_tensors([*value.values()])
    elif not isinstance(value, Tensor):
        raise ExportError(f"{type(value).__name__} instead of a tensor as its output")


class _IntegerRun(CheckedCalls, IntegerRun):
    """The integer reference on the graph of a file."""

    def __init__(self, model: PackedGraph) -> None:
        super().__init__(model)
        self.look_up(model.modules_by_name, model.constants)

"""Run an exported file in onnxruntime, like a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from qat.errors import ExportError


class OnnxModel:
    """An ``.onnx`` file loaded on the CPU; call it with a batch to get the logits.

    Args:
        path: The file.
        optimise: Whether onnxruntime may fuse and rewrite the graph.
        outputs: More tensors of the graph to return, by name.

    Raises:
        ExportError: If the file is missing or onnxruntime refuses it.
    """

    def __init__(
        self, path: str | Path, *, optimise: bool = True, outputs: Sequence[str] = ()
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise ExportError(f"expected an .onnx file, got none at '{path}': check the path.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        )
        try:
            content: Any = _with_outputs(path, outputs) if outputs else str(path)
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"expected an ONNX model that onnxruntime runs, got '{path}' ({reason}): "
                "export it again."
            ) from error
        self.outputs = [self.session.get_outputs()[0].name, *outputs]

    def run(self, x: Tensor) -> dict[str, np.ndarray]:
        """Return output name to array for one batch ``(N, ...)`` of real values."""
        (source,) = self.session.get_inputs()
        values = self.session.run(self.outputs, {source.name: x.numpy()})
        return dict(zip(self.outputs, map(np.asarray, values), strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the first output, the logits ``(N, K)``, for one batch."""
        return torch.from_numpy(self.run(x)[self.outputs[0]])

    @property
    def metadata(self) -> dict[str, Any]:
        """What the exporter stored: class names, normalisation, scheme, versions.

        Raises:
            ExportError: If another program wrote the file, in a form of its own.
        """
        stored = self.session.get_modelmeta().custom_metadata_map
        try:
            return {key: json.loads(value) for key, value in stored.items()}
        except ValueError as error:
            raise ExportError(
                f"expected metadata that qat wrote, got {stored}: export the model with qat."
            ) from error

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.session.get_inputs()[0].shape[1:])


def _with_outputs(path: Path, outputs: Sequence[str]) -> bytes:
    proto = onnx.load(path)
    for name in outputs:
        proto.graph.output.add().name = name
    return proto.SerializeToString()

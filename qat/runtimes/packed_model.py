"""Run a packed file in PyTorch: a module of integers, as exact as the integer reference.

No training code takes part: no fake-quant, no checkpoint, not the class of the trained model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.packed import FORMS, load_model
from qat.reference.run import IntegerRun


class PackedModel(nn.Module):
    """A ``.safetensors`` file as a module; call it with a batch to get the logits.

    Sums are exact integers, rounded once where the next quantize reads them, so codes and
    predictions are the converted model's and, up to float operations, onnxruntime's.

    Args:
        path: The file.
        threads: Threads that PyTorch may use from now on in this process; None leaves them.

    Attributes:
        graph_module: The converted model, whose own ``forward`` simulates the integers in float.

    Raises:
        ExportError: If the file is missing, damaged or not one of ours, or has no graph.
    """

    package = "torch"
    suffix = ".safetensors"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        super().__init__()
        self.graph_module, self.header = load_model(Path(path))
        if threads is not None:
            torch.set_num_threads(threads)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of one batch ``(N, ...)``, real values."""
        return IntegerRun(self.graph_module)(x)

    @property
    def metadata(self) -> dict[str, Any]:
        """What the exporter stored: class names, normalisation, scheme, versions."""
        return {key: value for key, value in self.header.items() if key not in FORMS}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.header["input"]["shape"])

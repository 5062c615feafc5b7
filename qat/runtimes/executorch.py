"""Run a ``.pte`` file in ExecuTorch, like a model.

XNNPACK multiplies sums with a float factor and rounds, as onnxruntime's kernels do; where that
product lies at a tie a code turns now and then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError
from qat.export.executorch import METADATA, load_package


class ExecutorchModel:
    """A ``.pte`` file loaded in ExecuTorch; call it with a batch to get the logits.

    Args:
        path: The file, which ``export_executorch`` wrote.
        threads: Threads that ExecuTorch may use from now on in this process; None leaves them.

    Raises:
        ExportError: If executorch is not installed, the file is missing or ExecuTorch refuses it.
    """

    package = "executorch"
    suffix = ".pte"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        package, libraries = load_package("runtime", "extension.pybindings.portable_lib")
        path = Path(path)
        if not path.is_file():
            raise ExportError(
                f"expected a .pte file, got none at '{path}': write it with scripts/lower.py."
            )
        if threads is not None:
            libraries._unsafe_reset_threadpool(threads)
        try:
            self.program = package.Runtime.get().load_program(path.read_bytes())
            self.method = self.program.load_method("forward")
            (facts,) = self.program.load_method(METADATA).execute([])
        except Exception as error:
            raise ExportError(
                f"expected a .pte file of ours that ExecuTorch runs, got '{path}' "
                f"({str(error).strip()}): write it again with scripts/lower.py."
            ) from error
        self.facts: dict[str, Any] = json.loads(facts)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of one batch ``(N, ...)``, sample by sample."""
        samples = x.contiguous().split(1)
        return torch.cat([self.method.execute([sample])[0].clone() for sample in samples])

    @property
    def metadata(self) -> dict[str, Any]:
        """What the exporter stored: class names, normalisation, scheme, versions."""
        return {key: value for key, value in self.facts.items() if key != "input_shape"}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch axis."""
        return tuple(self.facts["input_shape"])

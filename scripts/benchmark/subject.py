"""One file to measure: what it says about its input, and what it is fed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """One file to measure.

    Attributes:
        name: What it is called in tables: a path that was given, or what was made of it.
        kind: ``"artifact"``, ``"float"`` or ``"static"``.
        path: The .onnx file; those for other runtimes differ in the suffix.
        input_name: The tensor that takes the batch.
        shape: Shape of one sample.
        dtype: Type of its values, numpy's name.
        size_bytes: Of the .onnx file.
        reference: Name of the file that it is compared with, if any.
    """

    name: str
    kind: str
    path: Path
    input_name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    reference: str | None = None

    def runs_in(self, runtime: str) -> bool:
        """Whether there is a file for a runtime, or has to be one: artifacts have all of them."""
        return self.kind == "artifact" or self._file(runtime).is_file()

    def size(self, runtime: str) -> int:
        """Return the bytes of what a runtime reads."""
        file = self._file(runtime)
        return self.size_bytes if file == self.path else file.stat().st_size

    def _file(self, runtime: str) -> Path:
        from qat.runtimes.table import find_runtime

        return self.path.with_suffix(find_runtime(runtime).suffix)

    def batch(self, samples: int) -> Tensor:
        """Return random values ``(samples, *shape)``, each time the same.

        Integers are 0 and 1: tokens that every vocabulary has.
        """
        import numpy as np
        import torch

        generator, size = np.random.default_rng(0), (samples, *self.shape)
        if np.issubdtype(np.dtype(self.dtype), np.floating):
            values = generator.standard_normal(size)
        else:
            values = generator.integers(0, 2, size)
        return torch.from_numpy(values.astype(self.dtype))


def read_subject(name: str, kind: str, path: Path, reference: str | None = None) -> Subject:
    """Return a file, as far as it says about its input.

    Raises:
        ExportError: If it is no ONNX model, or has no single input of a fixed shape.
    """
    from onnx.helper import tensor_dtype_to_np_dtype

    from qat.errors import ExportError
    from qat.export.onnx_file import read_onnx

    proto = read_onnx(path)[1]
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    kinds = [value.type.tensor_type for value in inputs]
    shapes = [tuple(d.dim_value for d in kind.shape.dim[1:]) for kind in kinds]
    if len(inputs) != 1 or not all(shapes[0]):
        shown = ", ".join(str(value.name) for value in inputs)
        raise ExportError(
            f"expected a model with one input whose sizes behind the batch axis are fixed, got "
            f"'{path}' with {shown or 'none'} of shapes {shapes}: export it so."
        )
    dtype = str(tensor_dtype_to_np_dtype(kinds[0].elem_type))
    size = path.stat().st_size
    return Subject(name, kind, path, inputs[0].name, shapes[0], dtype, size, reference)

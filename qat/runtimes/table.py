"""Runtimes by name."""

from __future__ import annotations

from pathlib import Path

from qat.errors import ConfigError
from qat.export.runtime import OnnxModel
from qat.runtimes.executorch import ExecutorchModel
from qat.runtimes.inductor import InductorModel
from qat.runtimes.openvino import OpenVinoModel
from qat.runtimes.packed_model import PackedModel

Runtime = OnnxModel | OpenVinoModel | PackedModel | ExecutorchModel
RUNTIMES: dict[str, type[Runtime]] = {
    "onnxruntime": OnnxModel,
    "openvino": OpenVinoModel,
    "torch": PackedModel,
    "inductor": InductorModel,
    "executorch": ExecutorchModel,
}


def find_runtime(name: str) -> type[Runtime]:
    """Return the class that runs files in the runtime called ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if name not in RUNTIMES:
        raise ConfigError(
            f"expected the name of a runtime, got '{name}': choose of {', '.join(RUNTIMES)}."
        )
    return RUNTIMES[name]


def load_runtime(name: str, path: Path, *, threads: int | None = None) -> Runtime:
    """Return an artifact in a runtime, from the one of its files that the runtime reads.

    Args:
        name: The runtime's name.
        path: One file of the artifact; the others differ in the suffix.
        threads: Threads that it may use; None lets it choose.

    Raises:
        ConfigError: If there is no runtime of that name.
        ExportError: If it is not installed, or does not take the file.
    """
    load = find_runtime(name)
    return load(path.with_suffix(load.suffix), threads=threads)

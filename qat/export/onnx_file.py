"""What every runtime has to do with an ``.onnx`` file: find it, read what its exporter stored."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.errors import ExportError


def find_file(path: str | Path) -> Path:
    """Return ``path``, which has to exist.

    Raises:
        ExportError: If it does not.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"expected an .onnx file, got none at '{path}': check the path.")
    return path


def refused(path: Path, runtime: str, reason: str) -> ExportError:
    """Return the error for a file that a runtime does not take."""
    return ExportError(
        f"expected an ONNX model that {runtime} runs, got '{path}' ({reason}): export it again."
    )


def decode_metadata(stored: Mapping[str, str]) -> dict[str, Any]:
    """Return metadata as the values that the exporter was given.

    Args:
        stored: Names and JSON.

    Raises:
        ExportError: If another program wrote them, in a form of its own.
    """
    try:
        return {key: json.loads(value) for key, value in stored.items()}
    except ValueError as error:
        raise ExportError(
            f"expected metadata that qat wrote, got {stored}: export the model with qat."
        ) from error

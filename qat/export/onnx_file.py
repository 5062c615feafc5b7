"""What all have to do with an ``.onnx`` file: write it, read and check it, read its metadata."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from qat.errors import ExportError, reason
from qat.export.checksum import BLANK, FORMAT, FORMAT_KEY, KEY, check_filled, fill_checksum
from qat.export.onnx_check import check_model, take_in_data
from qat.files import write_bytes

log = logging.getLogger("qat")
PRODUCER = "qat"
_OURS = (KEY, FORMAT_KEY)


def write_onnx(path: Path, model: ModelProto) -> None:
    """Write a model to ``path``, with a checksum over all of it among its metadata.

    Raises:
        OSError: If it cannot be written.
    """
    others = [entry for entry in model.metadata_props if entry.key not in _OURS]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    for key, value in ((FORMAT_KEY, FORMAT), (KEY, BLANK.decode())):
        model.metadata_props.add(key=key, value=json.dumps(value))
    write_bytes(path, fill_checksum(model.SerializeToString()))


def read_onnx(path: str | Path) -> tuple[bytes, ModelProto]:
    """Return the bytes of an ``.onnx`` file and what they hold, checked.

    Tensors that other exporters put into a file beside it are taken in.

    Raises:
        ExportError: If it is missing, no ONNX model, not what its checksum was made of, or asks
            for what no file of ours does: files elsewhere, operations of other packages, more
            memory than is free.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"expected an .onnx file, got none at '{path}': check the path.")
    content = path.read_bytes()
    try:
        model = onnx.load_model_from_string(content)
        _check_sum(path, content, model)
        if take_in_data(model, path.parent):
            content = model.SerializeToString()
        check_model(model)
    except ExportError as error:
        raise ExportError(
            f"expected an ONNX model as qat writes it in '{path}', got {reason(error)}: "
            "export it again, or get it again from where it came."
        ) from error
    except (DecodeError, ValueError) as error:
        raise refused(path, "onnxruntime", reason(error)) from error
    return content, model


def _check_sum(path: Path, content: bytes, model: ModelProto) -> None:
    stored = {entry.key: entry.value for entry in model.metadata_props}
    if any(key in stored for key in _OURS):
        check_filled(content, str(stored.get(KEY, "")).strip('"'))
    elif model.producer_name == PRODUCER:
        log.warning("'%s' has no checksum: it was written before files had one", path)


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
        facts = {key: json.loads(value) for key, value in stored.items()}
    except (ValueError, RecursionError) as error:
        raise ExportError(
            f"expected metadata that qat wrote, got {stored!s:.200}: export the model with qat."
        ) from error
    return {key: value for key, value in facts.items() if key not in _OURS}

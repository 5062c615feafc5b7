"""SHA-256 over what a file of ours holds, stored inside it: a file that was changed says so.

A checksum finds damage and edits; it is no signature: whoever writes a file can write its checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import ExportError

KEY = "sha256"
FORMAT_KEY, FORMAT = "format", 2
"""Files of format 2 have a checksum; older ones name no format."""
BLANK = b"0" * 64


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of tensors (names, types, shapes, bytes) and of a header but its checksum.

    Args:
        tensors: Tensors by name, any shapes.
        header: Plain values, ready for JSON.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    rest = {key: value for key, value in header.items() if key != KEY}
    digest.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def fill_checksum(content: bytes) -> bytes:
    """Return the bytes of a file with its ``BLANK`` replaced by the SHA-256 of all of them.

    Args:
        content: Holds ``BLANK`` exactly once.
    """
    assert content.count(BLANK) == 1
    return content.replace(BLANK, hashlib.sha256(content).hexdigest().encode())


def check_filled(content: bytes, stored: str) -> None:
    """Compare the bytes of a file with the checksum that ``fill_checksum`` stored in it.

    Raises:
        ExportError: If they differ.
    """
    written = stored.encode()
    if len(written) != len(BLANK) or content.count(written) != 1:
        raise changed(stored)
    found = hashlib.sha256(content.replace(written, BLANK)).hexdigest()
    if found != stored:
        raise changed(stored)


def changed(stored: object) -> ExportError:
    """Return the error for content that is not what its checksum was made of."""
    return ExportError(f"content that its checksum ({str(stored)[:12]}...) was not made of")

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


def differing_files(folder: Path, stored: object) -> list[str]:
    """Return the names of files in ``folder`` whose content is not what its checksum says.

    Args:
        folder: Where the files lie.
        stored: SHA-256 by name, as ``report.json`` has it; names of other folders count as missing.

    Raises:
        OSError: If a file cannot be read.
    """
    named = stored.items() if isinstance(stored, Mapping) else ()
    return [str(name) for name, value in named if _hash_inside(folder, name) != value]


def _hash_inside(folder: Path, name: object) -> str | None:
    path = folder / str(name)
    is_inside = Path(str(name)).name == name and path.is_file()
    return hash_file(path) if is_inside else None


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
    """Return the bytes of a file with its last ``BLANK`` replaced by the SHA-256 of all of them."""
    return _replace_last(content, BLANK, hashlib.sha256(content).hexdigest().encode())


def check_filled(content: bytes, stored: object) -> None:
    """Compare the bytes of a file with the checksum that ``fill_checksum`` stored in it.

    Args:
        content: The bytes.
        stored: What was found in them; may be anything.

    Raises:
        ExportError: If they differ.
    """
    written = str(stored).encode()
    if len(written) != len(BLANK) or written not in content:
        raise changed(stored)
    if hashlib.sha256(_replace_last(content, written, BLANK)).hexdigest() != stored:
        raise changed(stored)


def _replace_last(content: bytes, old: bytes, new: bytes) -> bytes:
    place = content.rindex(old)
    return content[:place] + new + content[place + len(old) :]


def changed(stored: object) -> ExportError:
    """Return the error for content that is not what its checksum was made of."""
    return ExportError(f"content that its checksum ({str(stored)[:12]}...) was not made of")

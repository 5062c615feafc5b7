"""The bytes of a packed file: tensors, a header as JSON, a checksum; codes packed bit by bit.

Reading trusts nothing: what is not as it was written, or could not be computed with, is refused.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from qat.errors import ExportError, reason
from qat.export.checksum import FORMAT, FORMAT_KEY, KEY, changed, hash_tensors

log = logging.getLogger("qat")
_WHOLE_BYTES = (8, 16)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return integer ``codes``, any shape, as uint8 bytes ``(ceil(numel * bits / 8),)``."""
    if bits in _WHOLE_BYTES:
        stored = codes.flatten().numpy().astype(f"<i{bits // 8}")
        return torch.from_numpy(stored.view(np.uint8))
    values = codes.flatten().numpy().astype(np.int64) & (2**bits - 1)
    planes = (values[:, None] >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(planes.astype(np.uint8).ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, shape: tuple[int, ...], *, signed: bool) -> Tensor:
    """Return the int32 codes of ``shape`` that ``pack_bits`` packed."""
    if bits in _WHOLE_BYTES:
        stored = packed.numpy().view(f"<{'i' if signed else 'u'}{bits // 8}")
        return torch.from_numpy(stored.astype(np.int32)).view(shape)
    count = math.prod(shape)
    planes = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    values = np.zeros(count, dtype=np.int32)
    for bit in range(bits):
        values |= planes[:, bit].astype(np.int32) << bit
    if signed:
        values -= (values >> (bits - 1)) << bits
    return torch.from_numpy(values).view(shape)


def check_packed(packed: Tensor, name: str, bits: Any, shape: tuple[Any, ...]) -> None:
    """Compare what a header says of a weight with the bytes that are there.

    Args:
        packed: The bytes, ``(n,)``.
        name: The name of the tensor.
        bits: Bits of a code.
        shape: Shape of the codes.

    Raises:
        ExportError: If they do not fit.
    """
    numbers = (bits, *shape)
    fits = all(type(n) is int and n >= 0 for n in numbers) and 2 <= bits <= 16 and len(shape) < 9
    if (
        not fits
        or packed.dtype != torch.uint8
        or packed.numel() != -(-math.prod(shape) * bits // 8)
    ):
        raise ExportError(f"'{name}' of {packed.numel()} bytes for {bits} bits and shape {shape}")


def _bytes(shape: tuple[int, ...], bits: int) -> int:
    return -(-math.prod(shape) * bits // 8)


def pack_file(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """Return the bytes of a packed file, with its checksum.

    Args:
        tensors: Tensors by name, any shapes.
        header: What else it holds: plain values, ready for JSON.
    """
    text = json.dumps({**header, FORMAT_KEY: FORMAT})
    whole = json.loads(text)  # as a reader will see it: keys are texts, tuples are lists
    whole[KEY] = hash_tensors(tensors, whole)
    stored = {"qat": json.dumps(whole, separators=(",", ":"))}
    return save({k: v.contiguous() for k, v in tensors.items()}, metadata=stored)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file as they are stored, and its header, both checked.

    Args:
        path: The ``.safetensors`` file.

    Raises:
        ExportError: If it is no file of ours, or not what its checksum was made of.
    """
    if not path.is_file():
        raise ExportError("no file" if not path.exists() else "what is no regular file")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = json.loads((file.metadata() or {})["qat"])
    if not isinstance(header, dict):
        raise ExportError("a header that is no object")
    _check_content(path, tensors, header)
    return tensors, header


def _check_content(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Compare a file with its checksum, and refuse numbers that no model can compute with."""
    if KEY in header or FORMAT_KEY in header:
        if header.get(KEY) != hash_tensors(tensors, header):
            raise changed(header.get(KEY))
    else:
        log.warning("'%s' has no checksum: it was written before files had one", path)
    for name, value in tensors.items():
        if value.is_floating_point():
            _check_numbers(name, value)


def _check_numbers(name: str, value: Tensor) -> None:
    is_wrong = bool(value.isnan().any())
    if name.endswith("scale"):
        is_wrong = is_wrong or not bool((value.isfinite() & (value >= 0)).all())
    if is_wrong:
        raise ExportError(f"NaN, or a scale that is negative or infinite, in '{name}'")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one sentence about ``path``.

    Raises:
        ExportError: For every error inside the block.
    """
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"expected a packed model at '{path}', got {reason(error)}: "
            "check the path, or export it again."
        ) from error

"""Arrays in .npy and .npz files, read row by row."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from qat.errors import DataError

ARRAYS = (".npy", ".npz")
CHUNK = 1 << 20


class MemberRows:
    """Rows of an array that lies, compressed or not, in a zip file; read in rising order.

    Args:
        member: The opened .npy inside the zip file, at its start.
        size: Bytes in it.

    Raises:
        ValueError: If it holds no array whose rows lie one after the other.
    """

    def __init__(self, member: IO[bytes], size: int) -> None:
        self.shape, self.fortran, self.dtype = read_header(member)
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        self._member, self._start = member, member.tell()
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if size - self._start < math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{size} bytes are too few for shape {self.shape}")

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one row; one that lies before the last one read starts the zip member anew."""
        self._member.seek(self._start + index * self._row)
        values = np.frombuffer(self._member.read(self._row), self.dtype)
        return values.reshape(self.shape[1:])


Rows = np.ndarray | MemberRows


def read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it lies column by column, and dtype of the .npy that begins here.

    Raises:
        ValueError: If none does.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)  # 3.0 only adds names of fields in UTF-8


def open_array(file: Path, *, verify: bool = False) -> Rows:
    """Return the array of an .npy or .npz file, without reading it yet.

    Args:
        file: The file.
        verify: Whether what lies in an .npz is first read through once, to prove it undamaged.

    Raises:
        DataError: If there is none, or it is not clear which.
    """
    try:
        if file.suffix == ".npy":
            return np.lib.format.open_memmap(file, mode="r")
        return _open_member(file, verify)
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise DataError(
            f"expected an array in '{file}', got {type(error).__name__} ({error}): write it with "
            "numpy.save."
        ) from error


def _open_member(file: Path, verify: bool) -> Rows:
    with zipfile.ZipFile(file) as archive:
        name = _choose(archive.namelist(), file)
        info = archive.getinfo(f"{name}.npy")
        if verify:
            with archive.open(info) as member:
                while member.read(CHUNK):  # the last one compares the checksum
                    pass
        rows = MemberRows(archive.open(info), info.file_size)  # keeps the file open by itself
    if not rows.fortran or len(rows.shape) < 2:
        return rows
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
        return content[name]


def _choose(members: list[str], file: Path) -> str:
    names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
    chosen = names if len(names) == 1 else [n for n in ("x", "x_test") if n in names]
    if not chosen:
        raise DataError(
            f"expected one array, or one named x or x_test, in '{file}', got "
            f"{', '.join(names) or 'none'}: save only what is to be predicted."
        )
    return chosen[0]


def check_array(rows: Rows, shape: tuple[int, ...], file: Path) -> None:
    """Check that an array holds images, or samples as the model takes them.

    Raises:
        DataError: If it does not.
    """
    is_image = len(rows.shape) == 3 or (len(rows.shape) == 4 and rows.shape[-1] in (1, 3))
    fits = is_image if rows.dtype == "uint8" else rows.shape[1:] == shape
    kind, size = rows.dtype.kind, rows.dtype.itemsize
    if not fits or kind not in "uf" or (kind == "u" and size > 1):
        wanted = ", ".join(["N", *map(str, shape)])
        raise DataError(
            f"expected floats ({wanted}), or uint8 images (N, H, W, C) with 1 or 3 channels, in "
            f"'{file}', got {rows.dtype} of shape {rows.shape}: convert it."
        )

"""Arrays in .npy and .npz files, read row by row.

What a header or a zip file claims is compared with what is there before memory is taken for it.
"""

from __future__ import annotations

import math
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from qat.errors import DataError

ARRAYS = (".npy", ".npz")
CHUNK = 1 << 20
MOST_UNPACKED = 1 << 30
"""Bytes of an .npz stored column by column, which has to be unpacked whole."""
MOST_PIXELS = 178_956_970
"""Of one image: Pillow refuses more of them, too, for a small file can claim any number."""
_NUMPY_WRITES = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_DEFLATED = 1032  # bytes that one byte of a deflate stream can become


class StreamRows:
    """Rows of an array that lies in a file or, compressed or not, in a member of a zip file.

    Args:
        stream: The opened .npy, at its start.
        size: Bytes in it.

    Raises:
        ValueError: If it holds no array of that size.
    """

    def __init__(self, stream: IO[bytes], size: int) -> None:
        weakref.finalize(self, stream.close)
        self.shape, self.fortran, self.dtype = read_header(stream)
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects")
        if any(axis < 0 for axis in self.shape):
            raise ValueError(f"its header has the shape {self.shape}")
        self._stream, self._start = stream, stream.tell()
        self._row = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        if size - self._start < self.bytes:
            raise ValueError(f"{size} bytes are too few for shape {self.shape}")

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one row; one before the last one read starts a member of a zip file anew."""
        self._stream.seek(self._start + index * self._row)
        values = np.frombuffer(self._stream.read(self._row), self.dtype)
        return values.reshape(self.shape[1:])


Rows = np.ndarray | StreamRows


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
        return _open_file(file) if file.suffix == ".npy" else _open_member(file, verify)
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise DataError(
            f"expected an array in '{file}', got {type(error).__name__} ({error}): write it with "
            "numpy.save."
        ) from error


def _open_file(file: Path) -> Rows:
    stream = file.open("rb")
    rows = StreamRows(stream, file.stat().st_size)
    if not rows.fortran or len(rows.shape) < 2:
        return rows
    stream.close()
    return np.lib.format.open_memmap(file, mode="r")


def _open_member(file: Path, verify: bool) -> Rows:
    with zipfile.ZipFile(file) as archive:
        name = _choose(archive.namelist(), file)
        info = archive.getinfo(f"{name}.npy")
        _check_member(info)
        if verify:
            with archive.open(info) as member:
                while member.read(CHUNK):  # the last one compares the checksum
                    pass
        rows = StreamRows(archive.open(info), info.file_size)  # keeps the file open by itself
    if not rows.fortran or len(rows.shape) < 2:
        return rows
    if rows.bytes > MOST_UNPACKED:
        raise ValueError(f"{rows.bytes} bytes stored column by column; save it in order C")
    with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
        return content[name]


def _check_member(info: zipfile.ZipInfo) -> None:
    if info.flag_bits & 1 or info.compress_type not in _NUMPY_WRITES:
        raise ValueError("it is encrypted, or compressed as numpy does not")
    if info.file_size > (info.compress_size + 1) * _MOST_DEFLATED:
        raise ValueError(f"{info.compress_size} bytes cannot become {info.file_size}")


def read_row(rows: Rows, index: int, file: Path) -> np.ndarray:
    """Return one row of an array that was opened before.

    Raises:
        DataError: If the file has changed since.
    """
    try:
        return rows[index]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected row {index} of '{file}' as when it was opened, got {type(error).__name__} "
            f"({error}): the file has changed."
        ) from error


def _choose(members: list[str], file: Path) -> str:
    names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
    chosen = names if len(names) == 1 else [n for n in ("x", "x_test") if n in names]
    if not chosen or names.count(chosen[0]) > 1:
        some = ", ".join(names[:8])[:200]
        raise DataError(
            f"expected one array, or one named x or x_test, in '{file}', got {some or 'none'}: "
            "save only what is to be predicted."
        )
    return chosen[0]


def check_array(rows: Rows, shape: tuple[int, ...], file: Path) -> None:
    """Check that an array holds images, or samples as the model takes them.

    Raises:
        DataError: If it does not.
    """
    is_image = len(rows.shape) == 3 or (len(rows.shape) == 4 and rows.shape[-1] in (1, 3))
    is_image = is_image and 0 < math.prod(rows.shape[1:3]) <= MOST_PIXELS
    fits = is_image if rows.dtype == "uint8" else rows.shape[1:] == shape
    kind, size = rows.dtype.kind, rows.dtype.itemsize
    if not fits or kind not in "uf" or (kind == "u" and size > 1):
        wanted = ", ".join(["N", *map(str, shape)])
        raise DataError(
            f"expected floats ({wanted}), or uint8 images (N, H, W, C) with 1 or 3 channels, in "
            f"'{file}', got {rows.dtype} of shape {rows.shape}: convert it."
        )

"""Arrays from an ``.npz`` file of any origin: nothing is unpickled, sizes are bounded first."""

import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from qat.errors import DataError, printable
from qat.files import kind
from qat.memory import check_fits

SUFFIX = ".npy"
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
REMEDY = "write it with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"


def list_npz(path: Path) -> list[str]:
    """Return the names of the arrays in a file; none where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [info.filename.removesuffix(SUFFIX) for info in archive.infolist()]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return []


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str]) -> dict[str, np.ndarray]:
    """Read arrays by name; what else is in the file is not looked at.

    Args:
        path: The file.
        required: Names of arrays that have to be there.
        optional: Names of arrays that may be there.

    Raises:
        DataError: If the file is missing, unreadable or too large, lacks a required array or has
            one twice.
    """
    if (what := kind(path)) != "a file":
        raise DataError(
            f"expected an .npz file at {printable(path)}, got: {what}; correct data.path."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path, required, optional)
            _check_sizes(archive, members, path)
            return {name: _read(archive, member) for name, member in members.items()}
    except DataError:
        raise
    except Exception as error:  # zipfile, its decoders and NumPy raise a dozen kinds
        raise DataError(
            f"expected plain arrays in {printable(path)}, but it cannot be read as .npz "
            f"({printable(error) or type(error).__name__}); {REMEDY}."
        ) from error


def _members(
    archive: zipfile.ZipFile, path: Path, required: Sequence[str], optional: Sequence[str]
) -> dict[str, zipfile.ZipInfo]:
    """Find the arrays by name, each once."""
    names = Counter(info.filename.removesuffix(SUFFIX) for info in archive.infolist())
    if missing := [name for name in required if name not in names]:
        found = ", ".join(printable(name, 40) for name in list(names)[:10]) or "nothing"
        raise DataError(
            f"expected the arrays {', '.join(required)} in {printable(path)}, but "
            f"{', '.join(missing)} is missing (found: {found}); add it with numpy.savez."
        )
    wanted = [name for name in (*required, *optional) if name in names]
    if twice := [name for name in wanted if names[name] > 1]:
        raise DataError(
            f"expected each array once in {printable(path)}, but {', '.join(twice)} is there more "
            f"than once; {REMEDY}."
        )
    infos = {info.filename.removesuffix(SUFFIX): info for info in archive.infolist()}
    return {name: infos[name] for name in wanted}


def _check_sizes(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> None:
    """Refuse arrays larger than memory, and headers that do not say how large an array is."""
    total = sum(info.file_size for info in members.values())
    # Twice: as read, and as the tensors that are made of it.
    remedy = "take fewer samples, or images as files with data=folder"
    check_fits(2 * total, f"the arrays of {printable(path)}", remedy, DataError)
    for name, info in members.items():
        with archive.open(info) as stream:
            shape, _, dtype = HEADERS[npy.read_magic(stream)](stream)
            stored = info.file_size - stream.tell()
        if dtype.hasobject:
            raise DataError(
                f"expected plain numbers in {name} of {printable(path)}, got Python objects, which "
                f"could run any code; convert it to numbers and {REMEDY}."
            )
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != stored:
            raise DataError(
                f"expected {math.prod(shape) * dtype.itemsize} bytes of {name} in "
                f"{printable(path)}, as its shape {printable(shape)} and type {dtype} say, got "
                f"{stored}: the file is damaged, so {REMEDY}."
            )


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)

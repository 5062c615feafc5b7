"""Arrays in .npy and .npz files, as inputs of a model."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from qat.errors import DataError

ARRAYS = (".npy", ".npz")


def open_array(file: Path) -> np.ndarray:
    """Return the array of an .npy or .npz file, the former without reading it yet.

    Raises:
        DataError: If there is none, or it is not clear which.
    """
    import numpy as np

    try:
        if file.suffix == ".npy":
            return np.lib.format.open_memmap(file, mode="r")
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            names: list[str] = content.files
            chosen = names if len(names) == 1 else [n for n in ("x", "x_test") if n in names]
            if chosen:
                return content[chosen[0]]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected an array in '{file}', got {type(error).__name__} ({error}): write it with "
            "numpy.save."
        ) from error
    raise DataError(
        f"expected one array, or one named x or x_test, in '{file}', got {', '.join(names)}: "
        "save only what is to be predicted."
    )


def check_array(array: np.ndarray, shape: tuple[int, ...], file: Path) -> None:
    """Check that an array holds images, or samples as the model takes them.

    Raises:
        DataError: If it does not.
    """
    is_image = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3))
    fits = is_image if array.dtype == "uint8" else array.shape[1:] == shape
    if not fits or array.dtype.kind not in "uf" or (array.dtype.kind == "u" and array.itemsize > 1):
        wanted = ", ".join(["N", *map(str, shape)])
        raise DataError(
            f"expected floats ({wanted}), or uint8 images (N, H, W, C) with 1 or 3 channels, in "
            f"'{file}', got {array.dtype} of shape {array.shape}: convert it."
        )

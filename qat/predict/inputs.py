"""The inputs of a prediction, numbered: a file is one of them, an array as many as it has rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from qat.errors import DataError
from qat.predict.arrays import ARRAYS, Rows, read_row
from qat.predict.reader import Reader


def list_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files that the inputs name: those of a folder are its images, sorted.

    Links to folders inside a folder are not followed, so there are no circles.

    Raises:
        DataError: If an input does not exist, is no file or folder, or a folder holds no image or
            cannot be read.
    """
    files: list[Path] = []
    for path in inputs:
        found = _list_folder(path) if path.is_dir() else [path]
        if not found or not (path.is_dir() or path.is_file()):
            raise DataError(
                f"expected an image, an array or a folder of images, got '{path}', which "
                f"{_what_is_wrong(path)}: correct the path."
            )
        files += found
    return files


def _list_folder(folder: Path) -> list[Path]:
    """Return what is named like an image in a folder and in those inside it, sorted."""
    try:
        tree = [(Path(root), names) for root, _, names in os.walk(folder, onerror=_raise)]
    except OSError as error:
        raise DataError(
            f"expected a folder that can be read whole, got '{folder}' ({error}): correct its "
            "rights, or name what is to be predicted."
        ) from error
    files = (root / name for root, names in tree for name in names)
    return sorted(file for file in files if file.suffix.lower() in IMG_EXTENSIONS)


def _raise(error: OSError) -> None:
    raise error


def _what_is_wrong(path: Path) -> str:
    if path.is_dir():
        return "holds no image"
    return "is neither file nor folder" if path.exists() else "does not exist"


def fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of names, sizes and times of change: the same only for the same inputs."""
    digest = hashlib.sha256()
    for file in files:
        try:
            facts = file.stat()
            size, changed = facts.st_size, facts.st_mtime_ns
        except OSError:  # a link to nothing; it will be left out
            size = changed = -1
        digest.update(f"{show_name(file)}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()


def show_name(file: Path) -> str:
    """Return the name of a file in characters that any output can hold, whatever the locale."""
    name = os.fsencode(file).decode("utf-8", "surrogateescape")
    return name.encode("utf-8", "backslashreplace").decode()


class Inputs:
    """Every input has a number, by which it can be read in any process.

    Arrays are opened once to count their rows; one that cannot be used is one unreadable input.

    Args:
        files: Images and arrays, in the order of their numbers.
        reader: What turns them into samples.

    Attributes:
        images: How many of the inputs are to be decoded or resized.
    """

    def __init__(self, files: Sequence[Path], reader: Reader) -> None:
        self.files, self.reader = files, reader
        self.images = len(files)
        self._broken: dict[Path, str] = {}
        self._opened: tuple[Path, Rows] | None = None
        counts = np.ones(len(files), dtype=np.int64)
        for number, file in enumerate(files):
            if file.suffix in ARRAYS:
                counts[number] = self._count(file)
        self._ends = counts.cumsum()

    def _count(self, file: Path) -> int:
        self.images -= 1
        try:
            rows = self.reader.open(file, verify=True)
        except DataError as error:
            self._broken[file] = str(error)
            return 1
        self.images += rows.shape[0] if rows.dtype == "uint8" else 0
        return rows.shape[0]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.files else 0

    def locate(self, number: int) -> tuple[Path, int | None]:
        """Return the file of an input, and its row if the file is an array that can be used."""
        place = int(np.searchsorted(self._ends, number, side="right"))
        file = self.files[place]
        if file.suffix not in ARRAYS or file in self._broken:
            return file, None
        before = int(self._ends[place - 1]) if place else 0
        return file, number - before

    def name(self, number: int) -> str:
        """Return what an input is called in every output: its file, and its row in brackets."""
        file, row = self.locate(number)
        return show_name(file) if row is None else f"{show_name(file)}[{row}]"

    def read(self, number: int) -> Tensor:
        """Return an input as a normalised sample, float32.

        Raises:
            DataError: If it cannot be read, or does not fit the model.
        """
        file, row = self.locate(number)
        if file in self._broken:
            raise DataError(self._broken[file])
        if row is None:
            return self.reader.image(file)
        if self._opened is None or self._opened[0] != file:
            self._opened = file, self.reader.open(file)
        return self.reader.row(read_row(self._opened[1], row, file), file)

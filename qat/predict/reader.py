"""Files turned into samples: images and arrays, with the shape and the values a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional

from qat.data.folder import CROP_RATIO, read_image
from qat.data.tensors import TensorSource
from qat.errors import DataError
from qat.predict.arrays import ARRAYS, check_array, open_array


def list_files(inputs: Iterable[Path]) -> list[Path]:
    """Return the files that the inputs name: those of a folder are its images, sorted.

    Raises:
        DataError: If an input does not exist, or a folder holds no image.
    """
    files: list[Path] = []
    for path in inputs:
        found = [path]
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            found = sorted(p for p in inside if p.is_file())
        if not found or not found[0].exists():
            raise DataError(
                f"expected an image, an array or a folder of images, got '{path}', which "
                f"{'holds no image' if path.is_dir() else 'does not exist'}: correct the path."
            )
        files += found
    return files


@dataclass
class Reader:
    """Turns files into normalised samples of one shape, and remembers what it could not read.

    Attributes:
        shape: Shape of a sample as the model takes it.
        mean: Subtracted from each channel, if there is one.
        std: Divides each channel afterwards.
        crop: Whether images are cropped at the centre, as the folder data do to evaluate.
        unreadable: Name and reason of every input that was left out.
    """

    shape: tuple[int, ...]
    mean: list[float] | None
    std: list[float] | None
    crop: bool = False
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def read(self, files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and sample of every input that can be read."""
        for file in files:
            try:
                yield from self._array(file) if file.suffix in ARRAYS else self._image(file)
            except DataError as error:
                self.unreadable.append((str(file), str(error)))

    def _image(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        yield str(file), self._normalise(self._pixels(open_image(file), file))

    def _array(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        rows = open_array(file, verify=True)
        check_array(rows, self.shape, file)
        for i in range(rows.shape[0]):
            name, values = f"{file}[{i}]", rows[i]
            if values.dtype == "uint8":
                grey = values.shape[2:] == (1,)
                image = Image.fromarray(np.array(values[..., 0] if grey else values))
                yield name, self._normalise(self._pixels(image, file))
            elif np.isfinite(values).all():
                sample = torch.from_numpy(np.array(values, dtype=np.float32))
                yield name, self._normalise(sample)
            else:
                self.unreadable.append((name, "expected numbers, got NaN or infinity"))

    def _pixels(self, image: Any, file: Path) -> Tensor:
        """Return an image with channels and size of the model, uint8 ``(C, H, W)``."""
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise DataError(
                f"expected float samples of shape {self.shape} for this model, got an image in "
                f"'{file}': save them as an .npy of shape (N, ...)."
            )
        channels, *size = self.shape
        image = image.convert("L" if channels == 1 else "RGB")
        if self.crop:
            image = functional.resize(image, [round(max(size) / CROP_RATIO)])
            image = functional.center_crop(image, size)
        return functional.pil_to_tensor(functional.resize(image, size))

    def _normalise(self, sample: Tensor) -> Tensor:
        """Return ``sample`` as the data modules would, with their arithmetic; float32."""
        source = TensorSource(sample[None], torch.zeros(1), self.mean, self.std)
        return source.__getitems__([(0, 0)])[0][0]


def open_image(file: Path) -> Image.Image:
    """Return an image file, decoded, as RGB.

    Raises:
        DataError: If it cannot be decoded.
    """
    try:
        return read_image(str(file))
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise DataError(f"expected an image, got {type(error).__name__} ({error})") from error

"""Images and rows of arrays turned into samples, with the shape and the values a model takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from qat.data.folder import CROP_RATIO, read_image
from qat.data.tensors import TensorSource
from qat.errors import DataError
from qat.predict.arrays import MOST_PIXELS, Rows, check_array, open_array


@dataclass(frozen=True)
class Reader:
    """Turns what lies in files into normalised samples of one shape.

    Attributes:
        shape: Shape of a sample as the model takes it.
        mean: Subtracted from each channel, if there is one.
        std: Divides each channel afterwards.
        crop: Whether images are cropped at the centre, as the folder data do to evaluate.
    """

    shape: tuple[int, ...]
    mean: list[float] | None
    std: list[float] | None
    crop: bool = False

    def image(self, file: Path) -> Tensor:
        """Return the sample of an image file, float32.

        Raises:
            DataError: If it cannot be decoded, or the model takes no images.
        """
        return self._normalise(self._pixels(open_image(file), file))

    def open(self, file: Path, *, verify: bool = False) -> Rows:
        """Return the array of a file whose rows :meth:`row` takes; ``verify`` as in `open_array`.

        Raises:
            DataError: If there is none, or it does not fit the model.
        """
        rows = open_array(file, verify=verify)
        check_array(rows, self.shape, file)
        if rows.dtype == "uint8":
            self._check_images(file)
        return rows

    def row(self, values: np.ndarray, file: Path) -> Tensor:
        """Return the sample of one row of an array, float32.

        Raises:
            DataError: If a value is not finite.
        """
        if values.dtype == "uint8":
            grey = values.shape[2:] == (1,)
            image = Image.fromarray(np.array(values[..., 0] if grey else values))
            return self._normalise(self._pixels(image, file))
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            sample = torch.from_numpy(np.array(values, dtype=np.float32))
        if not sample.isfinite().all():
            raise DataError("expected numbers, got NaN or infinity")
        return self._normalise(sample)

    def _check_images(self, file: Path | None) -> None:
        if len(self.shape) != 3 or self.shape[0] not in (1, 3):
            raise DataError(
                f"expected float samples of shape {self.shape} for this model, got an image in "
                f"'{file}': save them as an .npy of shape (N, ...)."
            )

    def _pixels(self, image: Any, file: Path | None) -> Tensor:
        """Return an image with channels and size of the model, uint8 ``(C, H, W)``."""
        self._check_images(file)
        channels, *size = self.shape
        image = image.convert("L" if channels == 1 else "RGB")
        if self.crop:
            target = round(max(size) / CROP_RATIO)
            if target * target * max(image.size) > MOST_PIXELS * min(image.size):
                raise DataError(f"expected sides of similar length to crop, got {image.size}")
            image = functional.resize(image, [target])
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
    if not file.is_file():  # opening a pipe would wait for somebody to write
        raise DataError("expected a file, got none: it is gone, or something else by that name.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but allowed
            return read_image(str(file))
    except DataError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise DataError(f"expected an image, got {type(error).__name__} ({error})") from error

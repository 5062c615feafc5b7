"""Images or features from one ``.npz`` file: the plainest way to bring your own data."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from qat.data.augment import CropFlip, check_augment
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD
from qat.data.tensors import TensorSource, check_finite, check_labels
from qat.errors import DataError

KEYS = ("x_train", "y_train", "x_test", "y_test")
PADDING = 4


class ArraysData(DataModule):
    """The arrays ``x_train, y_train, x_test, y_test`` of an ``.npz`` file, held in memory.

    uint8 inputs are images, shape (N, H, W, C), and are scaled to 0..1; float inputs, shape
    (N, ...), are taken as they are. ``class_names`` in the file defaults to "0", "1", ...

    Args:
        path: The file.
        mean: Subtracted per channel; None means that of ImageNet for uint8 images with 3 channels,
            and otherwise nothing.
        std: Divides per channel, with the same default.
        augment: "crop_flip" (shift by up to 4 pixels, mirror), "crop" (shift only) or "none".
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``augment`` is unknown.
    """

    def __init__(
        self,
        path: str | Path,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str = "crop_flip",
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_augment(augment)
        self.path = Path(path)
        self.augment = augment
        self._statistics = (mean, std)

    def load(self) -> Loaded:
        """Read and check the file.

        Raises:
            DataError: If the file or an array is missing or malformed.
        """
        arrays = read_npz(self.path)
        inputs = {name: _inputs(arrays[name], f"{name} of {self.path}") for name in KEYS[::2]}
        labels = {name: _labels(arrays[name], f"{name} of {self.path}") for name in KEYS[1::2]}
        _check_fit(inputs, labels, self.path)
        names = _class_names(arrays.get("class_names"), labels, self.path)
        for name, y in labels.items():
            check_labels(y, len(names), f"{name} of {self.path}")
        x, x_test = inputs["x_train"], inputs["x_test"]
        mean, std = self._normalisation(x)
        train = TensorSource(x, labels["y_train"], mean, std, self._augmentation(x))
        return Loaded(train, TensorSource(x_test, labels["y_test"], mean, std), names, mean, std)

    def _normalisation(
        self, x: Tensor
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        is_rgb = x.dtype == torch.uint8 and x.shape[1] == 3
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if is_rgb else (None, None)
        given = [
            default if v is None else v
            for v, default in zip(self._statistics, defaults, strict=True)
        ]
        for key, value in zip(("mean", "std"), given, strict=True):
            if value is not None and (
                len(value) != x.shape[1] or (key == "std" and min(value) <= 0)
            ):
                raise DataError(
                    f"expected data.{key} to have {x.shape[1]} values (std above 0), one for each "
                    f"channel of {self.path}, got {list(value)}; correct data.{key}."
                )
        mean, std = (None if v is None else tuple(float(n) for n in v) for v in given)
        return mean, std

    def _augmentation(self, x: Tensor) -> CropFlip | None:
        if self.augment == "none":
            return None
        if x.ndim != 4:
            raise DataError(
                f"expected images (N, H, W, C) in {self.path} for data.augment={self.augment}, but "
                f"x_train has samples of shape {tuple(x.shape[1:])}; set data.augment=none."
            )
        return CropFlip(len(x), PADDING, flip=self.augment == "crop_flip", seed=self.seed)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a file, without unpickling anything.

    Args:
        path: The ``.npz`` file.

    Raises:
        DataError: If the file is missing, unreadable or lacks one of the four arrays.
    """
    if not path.is_file():
        raise DataError(f"expected an .npz file at {path}, but there is none; correct data.path.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"expected plain arrays in {path}, but it cannot be read as .npz ({error}); write it "
            f"with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        ) from error
    if missing := [key for key in KEYS if key not in arrays]:
        raise DataError(
            f"expected the arrays {', '.join(KEYS)} in {path}, but {', '.join(missing)} is missing "
            f"(found: {', '.join(arrays) or 'nothing'}); add it with numpy.savez."
        )
    return arrays


def _class_names(stored: np.ndarray | None, labels: dict[str, Tensor], path: Path) -> list[str]:
    """Return the stored class names, or "0", "1", ... up to the highest label."""
    if stored is not None:
        return [str(name) for name in stored.ravel()]
    train, test = (int(y.max()) + 1 for y in labels.values())
    if train != test:
        raise DataError(
            f"expected as many classes in y_test as in y_train of {path}, but y_train has {train} "
            f"and y_test has {test}; correct the labels, or store all class_names in the file."
        )
    return [str(label) for label in range(train)]


def _inputs(x: np.ndarray, where: str) -> Tensor:
    """Turn stored inputs into a tensor: images become (N, C, H, W), floats stay as they are."""
    if x.dtype == np.uint8 and x.ndim == 4:
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    if x.dtype.kind == "f" and x.ndim >= 2:
        check_finite(tensor := torch.from_numpy(x).float(), where)
        return tensor
    raise DataError(
        f"expected {where} to hold uint8 images (N, H, W, C) or floats (N, ...), but it is "
        f"{x.dtype} of shape {x.shape}; convert it."
    )


def _labels(y: np.ndarray, where: str) -> Tensor:
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(
            f"expected {where} to hold whole numbers of shape (N,), but it is {y.dtype} of shape "
            f"{y.shape}; store one class number for each sample."
        )
    return torch.from_numpy(y.astype(np.int64))


def _check_fit(x: dict[str, Tensor], y: dict[str, Tensor], path: Path) -> None:
    """Check that inputs and labels pair up and that training and test inputs look alike."""
    for (x_name, inputs), (y_name, labels) in zip(x.items(), y.items(), strict=True):
        if len(inputs) != len(labels) or len(labels) < 2:
            raise DataError(
                f"expected one label for each of 2 or more samples in {path}, but {x_name} has "
                f"{len(inputs)} samples and {y_name} {len(labels)} labels; make them match."
            )
    train, test = x.values()
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"expected x_test of {path} to be like x_train, {train.dtype} samples of shape "
            f"{tuple(train.shape[1:])}, but it has {test.dtype} of shape {tuple(test.shape[1:])}; "
            f"prepare both the same way."
        )

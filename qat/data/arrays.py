"""Images or features from one ``.npz`` file: the plainest way to bring your own data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from qat.data.arguments import MOST, check_text, statistic
from qat.data.augment import CropFlip, check_augment
from qat.data.base import DataModule, Loaded, Loading
from qat.data.named import TEST, TRAIN, NamedSource, check_alike, named_inputs
from qat.data.npz import list_npz, read_npz
from qat.data.source import IMAGENET_MEAN, IMAGENET_STD
from qat.data.tensors import TensorSource, check_finite, check_labels
from qat.errors import DataError
from qat.files import kind

KEYS = ("x_train", "y_train", "x_test", "y_test")
PADDING = 4
MOST_CHANNELS = 4


class ArraysData(DataModule):
    """The arrays ``x_train, y_train, x_test, y_test`` of an ``.npz`` file, held in memory.

    uint8 inputs are images, shape (N, H, W, C), and are scaled to 0..1; float inputs, shape
    (N, ...), are taken as they are. ``class_names`` in the file defaults to "0", "1", ...
    A model with several inputs has an array for each, ``x_train/NAME`` and ``x_test/NAME``: floats,
    whole numbers or booleans, taken as they are and passed by name.

    Args:
        path: The file.
        mean: Subtracted per channel; None means that of ImageNet for uint8 images with 3 channels,
            and otherwise nothing.
        std: Divides per channel, with the same default.
        augment: "crop_flip" (shift by up to 4 pixels, mirror), "crop" (shift only) or "none".
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If ``augment`` is unknown, or a path or a number is none.
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
        check_text("path", path)
        self.path = Path(path)
        self.augment = augment
        self._statistics = statistic("mean", mean), statistic("std", std)

    def load(self) -> Loaded:
        """Read and check the file.

        Raises:
            DataError: If the file or an array is missing or malformed.
        """
        names = list_npz(self.path) if kind(self.path) == "a file" else []
        named = [name for name in names if name.startswith((TRAIN, TEST))]
        if named:
            return self._load_named(named)
        arrays = read_npz(self.path, KEYS, ["class_names"])
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

    def _load_named(self, names: Sequence[str]) -> Loaded:
        if self.augment != "none" or any(value is not None for value in self._statistics):
            raise DataError(
                f"expected data.augment=none and no data.mean or data.std for the several inputs "
                f"of {self.path}, got augment={self.augment}: prepare them in the file."
            )
        arrays = read_npz(self.path, [*names, *KEYS[1::2]], ["class_names"])
        train, test = (named_inputs(arrays, prefix, self.path) for prefix in (TRAIN, TEST))
        check_alike(train, test, self.path)
        labels = {name: _labels(arrays[name], f"{name} of {self.path}") for name in KEYS[1::2]}
        for (where, y), x in zip(labels.items(), (train, test), strict=True):
            _check_count(next(iter(x.values())), y, where, self.path)
        classes = _class_names(arrays.get("class_names"), labels, self.path)
        for where, y in labels.items():
            check_labels(y, len(classes), f"{where} of {self.path}")
        y_train, y_test = labels.values()
        return Loaded(NamedSource(train, y_train), NamedSource(test, y_test), classes)

    def _normalisation(
        self, x: Tensor
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        is_rgb = x.dtype == torch.uint8 and x.shape[1] == 3
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if is_rgb else (None, None)
        mean, std = (
            default if given is None else given
            for given, default in zip(self._statistics, defaults, strict=True)
        )
        for key, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != x.shape[1]:
                raise DataError(
                    f"expected data.{key} to have {x.shape[1]} values, one for each channel of "
                    f"{self.path}, got {list(value)}; correct data.{key}."
                )
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


def _class_names(stored: np.ndarray | None, labels: dict[str, Tensor], path: Path) -> list[str]:
    """Return the stored class names, or "0", "1", ... up to the highest label."""
    if stored is not None:
        return _stored_names(stored, path)
    train, test = (int(y.max()) + 1 for y in labels.values())
    if train != test:
        raise DataError(
            f"expected as many classes in y_test as in y_train of {path}, but y_train has {train} "
            f"and y_test has {test}; correct the labels, or store all class_names in the file."
        )
    if train > len(labels["y_train"]):
        raise DataError(
            f"expected classes numbered 0, 1, ... in y_train of {path}, but its highest label is "
            f"{train - 1} with {len(labels['y_train'])} samples; number the classes without gaps, "
            f"or store all class_names in the file."
        )
    return [str(label) for label in range(train)]


def _stored_names(stored: np.ndarray, path: Path) -> list[str]:
    """Return class names that came as text, bytes or whole numbers."""
    try:
        values = np.char.decode(stored, "utf-8") if stored.dtype.kind == "S" else stored
    except UnicodeDecodeError:
        values = None
    if values is None or values.dtype.kind not in "Uiu" or values.ndim != 1:
        raise DataError(
            f"expected class_names of {path} to hold text of shape (classes,), but it is "
            f"{stored.dtype} of shape {stored.shape}; store numpy.array([...]) of strings."
        )
    return [str(name) for name in values]


def _inputs(x: np.ndarray, where: str) -> Tensor:
    """Turn stored inputs into a tensor: images become (N, C, H, W), floats stay as they are."""
    if x.dtype == np.uint8 and x.ndim == 4:
        _check_channels_last(x, where)
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    if x.dtype.kind == "f" and x.ndim >= 2:
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
        check_finite(tensor, where)
        return tensor
    raise DataError(
        f"expected {where} to hold uint8 images (N, H, W, C) or floats (N, ...), but it is "
        f"{x.dtype} of shape {x.shape}; convert it."
    )


def _check_channels_last(x: np.ndarray, where: str) -> None:
    if x.shape[1] in (1, 3) and x.shape[3] > MOST_CHANNELS:
        raise DataError(
            f"expected {where} to hold images (N, H, W, C), channels last, but it is of shape "
            f"{x.shape}; turn it with x.transpose(0, 2, 3, 1)."
        )


def _labels(y: np.ndarray, where: str) -> Tensor:
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(
            f"expected {where} to hold whole numbers of shape (N,), but it is {y.dtype} of shape "
            f"{y.shape}; store one class number for each sample."
        )
    if len(y) and (int(y.min()) < 0 or int(y.max()) > MOST):
        raise DataError(
            f"expected labels from 0 in {where}, one number for each class, but they go from "
            f"{y.min()} to {y.max()}; number the classes 0, 1, ..."
        )
    return torch.from_numpy(y.astype(np.int64))


def _check_fit(x: dict[str, Tensor], y: dict[str, Tensor], path: Path) -> None:
    """Check that inputs and labels pair up and that training and test inputs look alike."""
    for inputs, (y_name, labels) in zip(x.values(), y.items(), strict=True):
        _check_count(inputs, labels, y_name, path)
    train, test = x.values()
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"expected x_test of {path} to be like x_train, {train.dtype} samples of shape "
            f"{tuple(train.shape[1:])}, but it has {test.dtype} of shape {tuple(test.shape[1:])}; "
            f"prepare both the same way."
        )


def _check_count(inputs: Tensor, labels: Tensor, y_name: str, path: Path) -> None:
    if len(inputs) != len(labels) or len(labels) < 2:
        raise DataError(
            f"expected one label for each of 2 or more samples in {path}, but "
            f"x{y_name.removeprefix('y')} has {len(inputs)} samples and {y_name} {len(labels)} "
            "labels; make them match."
        )

"""Data sets held in memory: one tensor of inputs, one of labels, whole batches at a time."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from qat.data.augment import CropFlip
from qat.data.source import Batch, Pair, Source
from qat.errors import ConfigError, DataError

Stat = Sequence[float] | None


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Refuse labels that are no class.

    Args:
        labels: Class numbers, shape (N,).
        num_classes: Number of classes.
        where: Name of the array, for the message.

    Raises:
        DataError: If a label is below 0 or above ``num_classes - 1``.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise DataError(
            f"expected labels 0 to {num_classes - 1} in {where}, but found {int(wrong[0])} "
            f"({len(wrong)} of {len(labels)} labels are out of range); correct the labels or the "
            f"list of class names."
        )


def check_finite(x: Tensor, where: str) -> None:
    """Refuse NaN and infinity.

    Args:
        x: Inputs of any shape.
        where: Name of the array, for the message.

    Raises:
        DataError: If a value is not finite.
    """
    if x.is_floating_point() and not (finite := torch.isfinite(x)).all():
        raise DataError(
            f"expected finite values in {where}, but {int((~finite).sum())} of {x.numel()} are NaN "
            f"or infinite; remove or repair those samples."
        )


class TensorSource(Source):
    """Inputs and labels in memory.

    Args:
        x: Inputs, uint8 or float, shape (N, ...); images are (N, C, H, W).
        y: Labels, shape (N,).
        mean: Subtracted from each channel (dimension 1), in units of the scaled input.
        std: Divides each channel afterwards.
        augment: Random crops and flips, applied before normalisation.

    uint8 inputs are scaled to 0..1 first, floats are taken as they are.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        mean: Stat = None,
        std: Stat = None,
        augment: CropFlip | None = None,
    ) -> None:
        self.x = x
        self.y = y.long()
        self.augment = augment
        shape = (-1, *[1] * (x.ndim - 2))
        scale = 1 / 255 if x.dtype == torch.uint8 else 1.0
        divisor = torch.tensor(1.0 if std is None else std).view(shape)
        self._gain = scale / divisor
        self._offset = torch.tensor(0.0 if mean is None else mean).view(shape) / divisor

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, pairs: Sequence[Pair]) -> Batch:
        """Read one batch, all of one epoch."""
        epoch = pairs[0][0]
        assert all(pair[0] == epoch for pair in pairs), "a batch never mixes epochs"
        index = torch.tensor([i for _, i in pairs], device=self.x.device)
        x = self.x[index]
        if self.augment is not None:
            x = self.augment(x, epoch, index)
        x = x.to(torch.float32, memory_format=torch.contiguous_format)
        return x * self._gain - self._offset, self.y[index]

    def to(self, device: str) -> "TensorSource":
        """Return the same samples held on ``device``, where batches are made, too.

        Raises:
            ConfigError: If there is no such device.
        """
        other = copy.copy(self)
        try:
            for name in ("x", "y", "_gain", "_offset"):
                setattr(other, name, getattr(self, name).to(device))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"expected a device that torch has here from data.device={device}, got "
                f"{type(error).__name__} ({str(error).splitlines()[0]}): correct or remove it."
            ) from error
        return other

    def plain(self) -> "TensorSource":
        """Return the same samples without augmentation, sharing memory."""
        other = copy.copy(self)
        other.augment = None
        return other

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(self.x.shape[1:])

    @property
    def is_random(self) -> bool:
        """Whether a sample's inputs differ from epoch to epoch."""
        return self.augment is not None

    @property
    def is_on_device(self) -> bool:
        """Whether batches come on another device than the CPU."""
        return self.x.device.type != "cpu"

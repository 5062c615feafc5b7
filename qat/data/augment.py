"""Random shifts and flips for a whole batch at once, from tables drawn once per epoch.

A table has one row per sample of the data set, so what happens to a sample depends on the seed, the
epoch and the sample, and not on the batch it happens to be in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.data.source import generator
from qat.errors import ConfigError

AUGMENTATIONS = ("crop_flip", "crop", "none")


def check_augment(augment: str) -> None:
    """Refuse an unknown augmentation.

    Raises:
        ConfigError: If ``augment`` is not one of ``AUGMENTATIONS``.
    """
    if augment not in AUGMENTATIONS:
        raise ConfigError(
            f"expected data.augment to be one of {', '.join(AUGMENTATIONS)}, got {augment!r}; "
            f"choose one of these."
        )


class CropFlip:
    """Pads with black, cuts out a random window of the old size, and mirrors half of the images.

    Args:
        num_samples: Size of the data set.
        padding: Black pixels added on each side.
        flip: Whether to mirror left and right; wrong for digits and letters.
        seed: Seed of the tables.
    """

    def __init__(self, num_samples: int, padding: int, flip: bool, seed: int) -> None:
        self.num_samples = num_samples
        self.padding = padding
        self.flip = flip
        self.seed = seed
        self._epoch: int | None = None
        self._table = torch.empty(0)

    def table(self, epoch: int, device: torch.device | None = None) -> Tensor:
        """Return the choices of an epoch, int64, shape (num_samples, 3): top, left, mirrored.

        Args:
            epoch: The epoch.
            device: Where to hold them; they are the same everywhere.
        """
        if self._epoch != epoch:
            random = generator("crop_flip", self.seed, epoch)
            shift = torch.randint(2 * self.padding + 1, (self.num_samples, 2), generator=random)
            mirror = torch.randint(2, (self.num_samples, 1), generator=random) * int(self.flip)
            self._epoch, self._table = epoch, torch.cat([shift, mirror], dim=1).to(device)
        return self._table

    def __call__(self, x: Tensor, epoch: int, index: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            x: Images before normalisation, where 0 is black, shape (B, C, H, W).
            epoch: The epoch.
            index: Position of each image in the data set, shape (B,).

        Returns:
            Images of the same type and shape.
        """
        height, width = x.shape[-2:]
        table = self.table(epoch, x.device)
        top, left, mirrored = table[index].unsqueeze(-1).unbind(1)
        columns = torch.arange(width, device=x.device)
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.where(mirrored.bool(), columns.flip(0), columns)
        padded = F.pad(x, [self.padding] * 4)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        # Channels last while gathering: one index per pixel, not one per value.
        pixels = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2)

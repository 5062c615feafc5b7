"""A made-up table: one Gaussian cluster of feature vectors per class.

All clusters are round and equally wide, so the best possible classifier is linear, and the distance
of their centres sets the accuracy it can reach: about 96 % at 4 standard deviations.
"""

from typing import Unpack

import torch
from torch import Tensor

from qat.data.arguments import check_number, check_whole
from qat.data.base import DataModule, Loaded, Loading
from qat.data.source import generator
from qat.data.tensors import TensorSource
from qat.errors import DataError
from qat.memory import check_fits

TEST_FRACTION = 0.2
COPIES = 3  # centres, noise and their sum
CANDIDATES = 2000
MOST_DISTANCE = 1e6  # float32 features keep a cluster's width


class TabularData(DataModule):
    """Generated feature vectors, four fifths to train on and one fifth to test.

    Args:
        num_samples: Samples in all.
        num_features: Numbers per sample.
        num_classes: Clusters.
        distance: From the origin to each cluster centre, in standard deviations of a cluster.
        **loading: Arguments of :class:`~qat.data.base.DataModule`.

    Raises:
        ConfigError: If a number is too small.
    """

    def __init__(
        self,
        num_samples: int = 10_000,
        num_features: int = 4,
        num_classes: int = 10,
        distance: float = 4.0,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(**loading)
        check_whole("num_samples", num_samples, 10)
        check_whole("num_features", num_features, 1)
        check_whole("num_classes", num_classes, 2, min(CANDIDATES, num_samples))
        check_number("distance", distance, 0, MOST_DISTANCE)
        self.num_samples = num_samples
        self.num_features = num_features
        self.num_clusters = num_classes
        self.distance = distance

    def load(self) -> Loaded:
        """Draw the clusters from the seed.

        Raises:
            DataError: If the table does not fit into memory.
        """
        rows = max(COPIES * self.num_samples, 2 * CANDIDATES)
        check_fits(
            rows * self.num_features * 4,
            f"a table of {self.num_samples} samples with {self.num_features} features",
            "lower data.num_samples or data.num_features",
            DataError,
        )
        random = generator("tabular", self.seed)
        centres = self.distance * directions(self.num_clusters, self.num_features, random)
        y = torch.randint(self.num_clusters, (self.num_samples,), generator=random)
        noise = torch.randn(self.num_samples, self.num_features, generator=random)
        x = centres[y] + noise
        cut = round(self.num_samples * (1 - TEST_FRACTION))
        names = [str(label) for label in range(self.num_clusters)]
        return Loaded(TensorSource(x[:cut], y[:cut]), TensorSource(x[cut:], y[cut:]), names)


def directions(num: int, num_features: int, random: torch.Generator) -> Tensor:
    """Choose unit vectors far from each other, each the farthest candidate from those before.

    Args:
        num: Number of vectors.
        num_features: Their length.
        random: Where the candidates are drawn from.

    Returns:
        Unit vectors, shape (num, num_features).
    """
    candidates = torch.randn(CANDIDATES, num_features, generator=random)
    candidates = candidates / candidates.norm(dim=1, keepdim=True)
    chosen = candidates[:1]
    for _ in range(num - 1):
        farthest = torch.cdist(candidates, chosen).amin(dim=1).argmax()
        chosen = torch.cat([chosen, candidates[farthest : farthest + 1]])
    return chosen

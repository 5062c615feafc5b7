"""What every initialiser is: it changes a float model once, at its calibration.

All of them write into parameters and running statistics that the model has anyway, so training,
checkpoints and export go on as if the float model had come like that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from qat.errors import ConfigError
from qat.graph.captured import Captured
from qat.kinds import require, whole


class Initialiser(ABC):
    """Change the model once, at its calibration.

    Args:
        num_batches: Training batches, under evaluation transforms, to look at.

    Raises:
        ConfigError: If there are none.
    """

    reads_grids = False
    """Whether it acts behind the calibration of weights, on their grids, or in front of it."""
    reads_codes = False
    """Whether it measures what the codes of weights do, and so wants them to be final."""

    def __init__(self, num_batches: int = 1) -> None:
        require("initialise.*.num_batches", num_batches, whole(1))
        self.num_batches = num_batches

    @abstractmethod
    def __call__(self, model: Captured, batches: Sequence[Any], reference: Captured) -> str:
        """Do it in place.

        Args:
            model: A prepared model; activations pass, weights are quantized if ``reads_grids``.
            batches: Inputs ``(N, ...)``, or calls.
            reference: What ``model`` should compute: itself, or if ``reads_grids`` a copy from
                before its weights were quantized, all in float.

        Returns:
            What was done, for people to read.
        """


def check_order(initialisers: Mapping[str, Initialiser]) -> None:
    """Refuse an order in which one would act in front of what was named before it.

    Args:
        initialisers: By the name that users know, in the order that they gave.

    Raises:
        ConfigError: If one that needs grids stands in front of one that comes before them, or one
            that needs codes in front of one that chooses them.
    """
    for (first, a), (second, b) in pairwise(initialisers.items()):
        if (a.reads_grids, a.reads_codes) > (b.reads_grids, b.reads_codes):
            raise ConfigError(
                f"expected {second} in front of {first} in initialise, as it changes the weights "
                f"that {first} finds on their grids, got {first} first: swap them."
            )

"""Observers: each sees tensors and answers one question, which range to cover.

They know nothing of quantizers; a recipe calls them by a word.
"""

from qat.observers.base import MinMax
from qat.observers.entropy import Entropy
from qat.observers.histogram import Histogram
from qat.observers.mean_magnitude import MeanMagnitude
from qat.observers.moving_average import MovingAverage
from qat.observers.mse import MeanSquaredError
from qat.observers.percentile import Percentile
from qat.observers.sawb import StatisticsAware
from qat.observers.unit_range import UnitRange

OBSERVERS: dict[str, type[MinMax]] = {
    "min_max": MinMax,
    "unit_range": UnitRange,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": MeanSquaredError,
    "mean_magnitude": MeanMagnitude,
    "entropy": Entropy,
    "sawb": StatisticsAware,
}

__all__ = [
    "OBSERVERS",
    "Entropy",
    "Histogram",
    "MeanMagnitude",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "StatisticsAware",
    "UnitRange",
]

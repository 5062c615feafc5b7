"""Observers: each sees tensors and answers one question, which range to cover.

They know nothing of quantizers; a recipe calls them by a word.
"""

from collections.abc import Callable

from qat.extensions import register_word
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


def register(word: str) -> Callable[[type[MinMax]], type[MinMax]]:
    """Return a decorator that gives an observer of the user's own a word for recipes.

    Args:
        word: What stands in a recipe; the module that registers it stands under ``imports``.

    Raises:
        ConfigError: If the word is taken, or the class is no observer.
    """
    return register_word(OBSERVERS, word, MinMax)


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
    "register",
]

"""Turns and statistics of an interleaved measurement: plain numbers in, plain numbers out.

A machine gets faster and slower while it is measured. So files take turns within every round, and
what is compared are medians of one round; the spread of their ratio over rounds says how far it
can be trusted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What the calls of one file at one batch size come to.

    Attributes:
        median_ms: Of all calls, in milliseconds.
        p99_ms: 99 % of the calls took no longer, interpolated linearly.
        throughput: Samples a second over all calls.
        calls: How many there were.
    """

    median_ms: float
    p99_ms: float
    throughput: float
    calls: int


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as its reference a file is: median and quartiles over rounds."""

    median: float
    low: float
    high: float


def turns(subjects: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield number of the round and subject: all take one turn a round, in the same order."""
    for number in range(rounds):
        for subject in subjects:
            yield number, subject


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return the median of every round, in the unit of its calls."""
    return [float(np.median(calls)) for calls in rounds]


def summarise(rounds: Sequence[Sequence[float]], batch: int) -> Summary:
    """Sum up the calls of all rounds.

    Args:
        rounds: Seconds of every call, by round.
        batch: Samples in a call.
    """
    calls = np.concatenate([np.asarray(r, dtype=float) for r in rounds])
    median, p99 = np.percentile(calls, [50, 99]) * 1e3
    return Summary(float(median), float(p99), float(batch * len(calls) / calls.sum()), len(calls))


def compare(reference: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Ratio:
    """Return how many times as fast as ``reference`` ``other`` is, round by round.

    Args:
        reference: Seconds of every call, by round.
        other: The same; as many rounds.
    """
    pairs = zip(medians(reference), medians(other), strict=True)
    low, median, high = np.percentile([a / b for a, b in pairs], [25, 50, 75])
    return Ratio(float(median), float(low), float(high))

"""What the forms of a model predict, from one pass over an evaluation set.

Forms that decide run on every sample; the others are slow, and run on samples spread over the set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.calls import Call
from qat.signature import Signature
from qat.training.evaluate import logits_of

log = logging.getLogger("qat")
Forms = Mapping[str, Callable[..., Any]]
Batches = Iterable[tuple[Any, Tensor]]
LEAST_SAMPLES = 8
"""Of a piece of a batch."""
SECONDS = 10.0
"""Between two lines that say how far it is."""


class Predicted(NamedTuple):
    """What one form predicts.

    Attributes:
        logits: ``(n, K)``.
        labels: ``(n,)``.
        rows: Numbers of the predictions among those of the whole set, ``(n,)``.
    """

    logits: Tensor
    labels: Tensor
    rows: Tensor


@torch.no_grad()
def predict_all(
    forms: Forms,
    signature: Signature,
    batches: Batches,
    sampled: Collection[str] = (),
    samples: int | None = None,
    piece: int | None = None,
) -> dict[str, Predicted]:
    """Return what every form predicts.

    Args:
        forms: Name to what maps a batch to logits ``(B, K)`` or ``(B, T, K)``, or a tree of them.
        signature: How they are called.
        batches: Inputs and labels, ``(B,)`` or ``(B, T)``.
        sampled: Names of forms that run on a part of the samples.
        samples: About how many they run on, at least; None for all. They are spread evenly; a set
            whose length is not known is run on as a whole.
        piece: Bytes of input, about, that forms get at once: values of few samples stay in the
            processor's cache; None for whole batches.
    """
    found: dict[str, list[Predicted]] = {kind: [] for kind in forms}
    seen, count, step, shown = 0, 0, 1, time.monotonic()
    for index, (batch, all_labels) in enumerate(batches):
        if index == 0:
            step = _step(batches, len(all_labels), samples)
        for call, y in _pieces(batch, all_labels, signature, piece):
            rows = torch.arange(count, count + y.numel()).view(y.shape)
            part = slice(-seen % step, None, step)
            for kind, run in forms.items():
                wanted = part if kind in sampled else slice(None)
                if len(y[wanted]):
                    logits = logits_of(run, signature.pick(call, wanted))
                    found[kind].append(_predicted(logits, y[wanted], rows[wanted]))
            seen, count = seen + len(y), count + y.numel()
        if time.monotonic() - shown > SECONDS:
            log.info("verify: %s samples%s", f"{seen:,}", _of_all(batches, index))
            shown = time.monotonic()
    return {
        kind: Predicted(*map(torch.cat, zip(*parts, strict=True))) for kind, parts in found.items()
    }


def _predicted(logits: Tensor, labels: Tensor, rows: Tensor) -> Predicted:
    return Predicted(logits.float().cpu(), labels.flatten().cpu(), rows.flatten())


def _pieces(
    batch: Any, labels: Tensor, signature: Signature, piece: int | None
) -> Iterator[tuple[Any, Tensor]]:
    """Yield a batch in pieces."""
    if piece is None:
        yield batch, labels
        return
    num_bytes = sum(x.nbytes for x in Call.of(batch).tensors)
    size = max(LEAST_SAMPLES, piece * len(labels) // max(num_bytes, 1))
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield signature.pick(batch, part), labels[part]


def _step(batches: Batches, size: int, samples: int | None) -> int:
    """Return ``n`` where every n-th sample is taken."""
    if samples is None or not isinstance(batches, Sized):
        return 1
    return max(1, len(batches) * size // samples)


def _of_all(batches: Batches, index: int) -> str:
    return f", {(index + 1) / len(batches):.0%}" if isinstance(batches, Sized) else ""

"""What a teacher says about every training sample, computed once and found by what a sample holds.

A sample is known by a 64-bit key: the sum of its bits, 16 at a time, each times a random odd number
of its place, in integers that wrap around; every device adds that up alike. Two samples that differ
share a key with a probability of at most 2**-48; samples that do not differ share their logits.

The table is in memory alone. A resumed run computes it anew, with the teacher of its checkpoint, in
the same batches in the same order, and gets the same bits wherever the rest of its training would.
A file would save one pass over the data per resume, but may be missing, stale or of another run;
as part of checkpoints the table would be written with each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.calls import Call
from qat.data.source import generator
from qat.errors import ConfigError
from qat.training.evaluate import logits_of

INT64 = torch.iinfo(torch.int64)


class TeacherCache:
    """Logits of known samples, found without running a network or waiting for the device.

    It holds a float32 number for each sample and class, and in a sequence for each position; twice
    as many while it is made.

    Args:
        model: The teacher, in eval mode; runs in full precision where its parameters are, and is
            not kept.
        batches: All samples in batches ``(N, ...)``, in one order and of one size in every run.
    """

    misses: Tensor
    """How many samples were looked up that are not known, int64, shape ``()``."""

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        device = next(model.parameters()).device
        self._factors = torch.empty(0, dtype=torch.int64)
        keys: list[Tensor] = []
        logits: list[Tensor] = []
        for batch in batches:
            call = Call.of(batch).to(device)
            if not keys:
                self._factors = odd_factors(_words(call.take(1))).to(device)
            keys.append(sample_keys(call, self._factors))
            logits.append(_logits(model, call))
        # The sort is stable, so that of samples that do not differ the first is found.
        self._keys, self._rows = torch.cat(keys).sort(stable=True)
        self._logits = torch.cat(logits)
        self.misses = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits for one call: ``(N, K)``, or ``(N * T, K)`` of sequences.

        A sample that is not known gets another one's, and is counted in ``misses``.
        """
        keys = sample_keys(Call(args, kwargs), self._factors)
        places = torch.searchsorted(self._keys, keys).clamp_max(len(self._keys) - 1)
        self.misses.add_((self._keys[places] != keys).sum())
        return self._logits[self._rows[places]].flatten(0, 1)


@torch.no_grad()
def _logits(model: nn.Module, call: Call) -> Tensor:
    """Return float32 logits ``(N, T, K)``; ``T`` is 1 where a sample has one prediction."""
    with torch.autocast(call.tensors[0].device.type, enabled=False):
        rows = logits_of(model, call).float()
    return rows.unflatten(0, (call.samples, -1))


def sample_keys(batch: Any, factors: Tensor) -> Tensor:
    """Return what each sample is known by, int64, shape ``(N,)``.

    Args:
        batch: Samples ``(N, ...)``, or a tuple or mapping of arguments.
        factors: Of one such sample, from :func:`odd_factors`.
    """
    return (_words(Call.of(batch)) * factors).sum(1)


def _words(call: Call) -> Tensor:
    """Return the bits of every sample, int16, shape ``(N, words)``."""
    rows = [x.flatten(1) if x.ndim > 1 else x[:, None] for x in call.tensors if _has_batch(x, call)]
    wide = [x.short() if x.element_size() == 1 else x.contiguous() for x in rows]
    return torch.cat([x.view(torch.int16) for x in wide], 1)


def _has_batch(x: Tensor, call: Call) -> bool:
    return x.ndim > 0 and len(x) == call.samples


def odd_factors(sample: Tensor) -> Tensor:
    """Return a random odd int64 for each 2 bytes of ``sample``, the same ones in every run."""
    count = sample.numel() * sample.element_size() // 2
    random = generator("teacher cache", count)
    return torch.randint(INT64.min, INT64.max, (count,), generator=random) | 1


def check_misses(misses: Tensor) -> None:
    """Refuse logits that belong to other samples; waits for the device.

    Args:
        misses: Of all processes, shape ``()``.

    Raises:
        ConfigError: If there are any.
    """
    if count := int(misses):
        raise ConfigError(
            "expected training samples that are the same in every epoch with "
            f"distillation.cache=true, got {count} in this one that the teacher has not seen: "
            "switch off what changes them, or set distillation.cache=false, and go back to a "
            "checkpoint from before this epoch."
        )

"""Speed of the fused fake-quant against a copy of as many bytes, in turns.

Bytes are those that have to move: forward, four read and four written for each value, and one for
its code; backward, eight read and four written. The copy reads half of them and writes as many.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qat.terminal import terminal

if TYPE_CHECKING:
    from torch import Tensor

EPILOG = """
examples:
  python scripts/benchmark/op.py
  python scripts/benchmark/op.py --modes "activation forward" --rounds 20
"""
SIZES = {"4.2 M values": (64, 64, 32, 32), "0.5 M values": (16, 32, 32, 32)}
OPERATORS = [
    f"{what} {way}" for what in ("activation", "weight") for way in ("forward", "backward")
]
FORWARD, BACKWARD = 9, 12
"""Bytes for each value."""
CALLS = 8


def operators(shape: tuple[int, ...], device: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Return, by name, a call of each operator and the bytes that it moves."""
    import torch

    from qat.functional.elements import Addend, Ends
    from qat.functional.kernels import make_kernels

    made, x = make_kernels(device), torch.randn(shape, device=device)
    grad, rows = torch.randn_like(x), shape[0]
    scale, zero, low, high = (torch.full((), v, device=device) for v in (0.02, 0.0, -128.0, 127.0))
    one = Ends(scale, zero, low, high, None, None)
    scales = [torch.full((rows, 1), v, device=device) for v in (0.02, 0.0)]
    flat = x.view(-1), grad.view(-1)
    split = x.view(rows, -1), grad.view(rows, -1)
    n = x.numel()
    return {
        "activation forward": (lambda: made.snap_one(flat[0], *Addend(), *one), FORWARD * n),
        "activation backward": (
            lambda: made.gradients_of_one(flat[1], flat[0], Addend(), one),
            BACKWARD * n,
        ),
        "weight forward": (lambda: made.snap_rows(split[0], *scales, low, high), FORWARD * n),
        "weight backward": (
            lambda: made.gradients_of_rows(split[1], split[0], *scales, low, high),
            BACKWARD * n,
        ),
    }


def measure(size: str, modes: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each operator at one size."""
    import torch
    from rounds import compare, medians, turns

    found = operators(SIZES[size], options.device)
    rows = []
    for mode in modes:
        call, moved = found[mode]
        source = torch.ones(moved // 8, device=options.device)  # pages never written are one page
        pair = {"copy": lambda source=source: source.clone(), mode: call}
        times: dict[str, list[list[float]]] = {name: [] for name in pair}
        for _, name in turns(list(pair), options.rounds):
            times[name].append([_seconds(pair[name], source) for _ in range(CALLS)])
        ratio = compare(times["copy"], times[mode])
        middle = sorted(medians(times[mode]))[options.rounds // 2]
        row: dict[str, Any] = {"network": size, "mode": mode, "gigabytes_s": moved / middle / 1e9}
        row["ratio_to_copy"], row["ratio_to_copy_quartiles"] = ratio.median, [ratio.low, ratio.high]
        rows.append(row)
    return rows


def _seconds(call: Callable[[], Any], source: Tensor) -> float:
    import torch

    if not source.is_cuda:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every operator; return the rows."""
    import torch
    from training_rows import chosen

    from qat.training.heap import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(options.threads)
    sizes = chosen(options.networks, SIZES, "--networks")
    modes = chosen(options.modes, OPERATORS, "--modes")
    return [row for size in sizes for row in measure(size, modes, options)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    from training_rows import run_guarded

    return run_guarded("op", run, argv, __doc__, EPILOG)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())

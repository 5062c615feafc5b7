"""Time of a training step: float, ours in every mode, and others, in turns.

A ratio is that of a round's medians: its median and quartiles over rounds. All quantized modes have
8-bit weights and activations; ours and LSQ by hand learn their scales. Freed memory stays with the
process, as in a run of qat: for all modes alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from qat.terminal import terminal

EPILOG = """
examples:
  python scripts/benchmark/step.py
  python scripts/benchmark/step.py --networks vit --modes "float,qat regional" --json found.json
"""


def measure(network: str, modes: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """Return a row for each mode of one network."""
    from networks import make_step
    from rounds import compare, medians, turns

    steps = {mode: make_step(network, mode, device) for mode in modes}
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[list[float]]] = {mode: [] for mode in modes}
    for _, mode in turns(modes, rounds):
        calls = []
        for _ in range(2):
            began = time.perf_counter()
            steps[mode]()
            calls.append(time.perf_counter() - began)
        times[mode].append(calls)
    rows = []
    for mode in modes:
        row: dict[str, Any] = {"network": network, "mode": mode}
        row["median_ms"] = 1e3 * sorted(medians(times[mode]))[rounds // 2]
        for key, reference in (
            ("ratio_to_float", "float"),
            ("ratio_to_float_compiled", "float compiled"),
        ):
            if reference in times:
                ratio = compare(times[mode], times[reference])
                row[key], row[f"{key}_quartiles"] = ratio.median, [ratio.low, ratio.high]
        rows.append(row)
    return rows


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every network; return the rows."""
    import torch
    from networks import MODES, NETWORKS
    from others import runs_here
    from training_rows import chosen

    from qat.training.heap import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(options.threads)
    networks = chosen(options.networks, NETWORKS, "--networks")
    modes = [m for m in chosen(options.modes, MODES, "--modes") if runs_here(m)]
    return [row for n in networks for row in measure(n, modes, options.rounds, options.device)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    from training_rows import run_guarded

    return run_guarded("step", run, argv, __doc__, EPILOG)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())

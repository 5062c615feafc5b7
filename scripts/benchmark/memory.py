"""Peak memory of a training step beyond what the model holds, each mode in a process of its own.

On the CPU it is the peak of the resident set during a step, reset before it (Linux); on a GPU what
torch says. The ratio is to the float model's.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qat.terminal import terminal

EPILOG = """
examples:
  python scripts/benchmark/memory.py
  python scripts/benchmark/memory.py --networks resnet18_cifar --json found.json
"""
SMALL_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""So that memory goes back to the system at once, and the peak is that of the step."""


def peak(network: str, mode: str, device: str) -> int:
    """Return the peak of one step, bytes, less what was there before it."""
    import torch
    from networks import make_step

    step = make_step(network, mode, device)
    for _ in range(3):
        step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    library, found = ctypes.CDLL("libc.so.6"), []
    for _ in range(3):
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        step()
        found.append(_resident("VmHWM") - before)
    return sorted(found)[1]


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"expected {key} in /proc/self/status, got none: measure on Linux.")


def measure(network: str, modes: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each mode of one network."""
    rows: list[dict[str, Any]] = []
    for mode in modes:
        command = [sys.executable, __file__, "--one", network, mode, "--device", options.device]
        command += ["--threads", str(options.threads)]
        done = subprocess.run(
            command, env={**os.environ, **SMALL_BLOCKS}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{network}, {mode}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append({"network": network, "mode": mode, **json.loads(done.stdout.splitlines()[-1])})
    reference = next((r["peak_bytes"] for r in rows if r["mode"] == "float"), None)
    for row in rows:
        row["memory_ratio"] = row["peak_bytes"] / reference if reference else None
    return rows


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every network and show the rows, or one of them in this process."""
    import torch
    from networks import MODES, NETWORKS
    from others import runs_here
    from training_rows import chosen

    torch.set_num_threads(options.threads)
    if options.one is not None:
        network, mode = options.one
        print(json.dumps({"peak_bytes": peak(network, mode, options.device)}))
        return []
    networks = chosen(options.networks, NETWORKS, "--networks")
    modes = [m for m in chosen(options.modes, MODES, "--modes") if runs_here(m)]
    return [row for n in networks for row in measure(n, modes, options)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    from training_rows import run_guarded

    return run_guarded("memory", run, argv, __doc__, EPILOG)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())

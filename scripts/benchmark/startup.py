"""Time from the start of a run to the end of its first quantized training step.

Each run is a process of its own that trains one step and ends. ``cold``: nothing was ever compiled
on this machine; ``warm``: it was, and the compiled code is found on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

from qat.terminal import terminal

EPILOG = """
examples:
  python scripts/benchmark/startup.py
  python scripts/benchmark/startup.py --networks resnet_w4a8 --modes warm --rounds 3
"""
BEGAN = "STARTUP_BEGAN"
TRAIN = Path(__file__).parents[2] / "train.py"
RECIPES = ("resnet_w4a8",)
POINTS = {
    "fit": "imports, capture, insertion, data",
    "train": "observers, quantizers, phases",
    "step": "calibration, kernels, first step",
}


class FirstStep(Callback):
    """Says when the trainer begins, when training does, and when one step is done; then ends."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say that everything is built."""
        del trainer, pl_module
        self._say("fit")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say that the loop begins."""
        del trainer, pl_module
        self._say("train")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say that a step is done, and end."""
        del trainer, pl_module, outputs, batch, batch_idx
        self._say("step")
        os._exit(0)

    def _say(self, point: str) -> None:
        print(json.dumps({"point": point, "seconds": time.time() - float(os.environ[BEGAN])}))
        sys.stdout.flush()


def start(recipe: str, cache: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one process; return seconds from its start to each point."""
    here, folder = str(Path(__file__).parent), tempfile.mkdtemp()
    Path(cache).mkdir(exist_ok=True)
    caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"), cache)  # code, and headers
    environment = {**os.environ, **caches, BEGAN: str(time.time())}
    environment["PYTHONPATH"] = os.pathsep.join((here, os.environ.get("PYTHONPATH", "")))
    environment["OMP_NUM_THREADS"] = str(options.threads)
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[options.device]
    overrides = [f"recipe={recipe}", "schedule.float_epochs=0", f"hydra.run.dir={folder}"]
    overrides += [
        "+callbacks.first_step={_target_: startup.FirstStep}",
        f"trainer.accelerator={accelerator}",
    ]
    command = [sys.executable, str(TRAIN), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"point"')]
    points = {line["point"]: line["seconds"] for line in lines}
    if set(points) != set(POINTS):
        from qat.errors import ConfigError

        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(f"expected a run that trains a step, got: {said}")
    return points


def measure(recipe: str, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each part of the way, and one for all of it."""
    with tempfile.TemporaryDirectory() as cache:
        if mode == "warm":
            start(recipe, cache, options)
        numbers = range(options.rounds)
        caches = [f"{cache}/{i}" if mode == "cold" else cache for i in numbers]
        runs = [start(recipe, found, options) for found in caches]
    rows, before = [], [0.0] * len(runs)
    for point, text in POINTS.items():
        now = [run[point] for run in runs]
        parts = [b - a for a, b in zip(before, now, strict=True)]
        rows.append({"network": recipe, "mode": mode, "part": text, **_spread(parts)})
        before = now
    return [*rows, {"network": recipe, "mode": mode, "part": "all", **_spread(before)}]


def _spread(seconds: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(seconds), "seconds_range": [min(seconds), max(seconds)]}


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every recipe; return the rows."""
    from training_rows import chosen

    modes = chosen(options.modes, ("cold", "warm"), "--modes")
    recipes = options.networks or list(RECIPES)
    return [row for r in recipes for mode in modes for row in measure(r, mode, options)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    from training_rows import run_guarded

    return run_guarded("startup", run, argv, __doc__, EPILOG)


if __name__ == "__main__":
    with terminal():
        sys.exit(main())

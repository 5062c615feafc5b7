"""Train float checkpoints of other habits, quantize them by the recipe alone, and make the table.

Every run is the command ``train.py recipe=resnet_w4a4 ckpt=...`` on a part of CIFAR-10, with fewer
epochs. Runs whose report is in the work folder are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rates_nets import NETS, Net, accuracy, read_images, train_float, write_subset
from table import markdown

from qat.files import write_text
from qat.terminal import show, terminal

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- rates -->", "<!-- /rates -->"
FLOAT_SEED = 0
TRAIN, TEST = 8000, 2000
HEAD = (
    "network", "rate", "seed", "float %", "post-training %", "trained %", "loss by rate", "probe s",
    "whole run s",
)  # fmt: skip


def make_inputs(name: str, data: Path, weights: Path, work: Path) -> tuple[Path, Path]:
    """Return the checkpoint of a network and the data of its runs; make what is missing."""
    checkpoint, subset = work / f"{name}.pt", work / "subset.npz"
    if checkpoint.is_file() and subset.is_file():
        return checkpoint, subset
    images = read_images(data)
    write_subset(images, subset, TRAIN, TEST)
    if not checkpoint.is_file():
        model = train_float(NETS[name], images, FLOAT_SEED, weights)
        show(f"{name}: float {accuracy(model, NETS[name], images):.2f} % of all test images")
        torch.save(model.state_dict(), checkpoint)
    return checkpoint, subset


def words(name: str, checkpoint: Path, subset: Path, seed: int) -> list[str]:
    """Return the words behind ``train.py``."""
    net: Net = NETS[name]
    return [
        "recipe=resnet_w4a4",
        "model=custom",
        f"model._target_=rates_nets.{name}",
        f"ckpt={checkpoint}",
        "data=arrays",
        f"data.path={subset}",
        f"data.batch_size={net.quantized_batch}",
        f"data.mean={[net.mean] * 3}",
        f"data.std={[net.std] * 3}",
        f"schedule.epochs={net.quantized_epochs}",
        f"seed={seed}",
    ]


def train(given: list[str], folder: Path) -> dict[str, Any]:
    """Return the report of a run in ``folder``, with the seconds that its log tells of the probe.

    Raises:
        subprocess.CalledProcessError: If it failed.
    """
    report, log = folder / "report.json", folder.with_suffix(".log")
    if not report.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join(
            [str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        )
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with log.open("w") as file:
            subprocess.run(
                [sys.executable, "train.py", *given, f"hydra.run.dir={folder}"],
                cwd=ROOT,
                env={**os.environ, **threads, "PYTHONPATH": paths},
                stdout=file,
                stderr=subprocess.STDOUT,
                check=True,
            )
    found = re.search(r"rates were tried in ([0-9.]+) s", log.read_text())
    return {**json.loads(report.read_text()), "probe": float(found[1]) if found else None}


def row(name: str, rate: str, report: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of one run."""
    accuracies, rates = report["accuracy"], report["learning_rate"]
    tried = {"0": rates["untrained"], **rates["tried"]} if rates["tried"] else {}
    losses = ", ".join(f"{r}: {'∞' if v is None else f'{v:.3f}'}" for r, v in tried.items())
    final = accuracies.get("onnxruntime", accuracies["fake_quant"])
    shown = [f"{value:.2f}" for value in (accuracies["float"], accuracies["post_training"], final)]
    chosen = f"{rates['first']:g}" if rate == "probed" else f"{rates['first']:g} (given)"
    seconds = "-" if report["probe"] is None else f"{report['probe']:.0f}"
    return (
        name,
        chosen,
        str(report["details"]["seed"]),
        *shown,
        losses or "-",
        seconds,
        f"{sum(report['seconds'].values()):.0f}",
    )


def parse() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="cifar10.npz: x_train, y_train, x_test, y_test")
    parser.add_argument("weights", type=Path, help="a folder with resnet20-12fca82f.th")
    parser.add_argument("work", type=Path, help="a folder for checkpoints and runs")
    parser.add_argument("--nets", nargs="+", choices=[*NETS], default=[*NETS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--given", type=float, default=0.02, help="a rate for the first seed, too")
    parser.add_argument("--done", action="store_true", help="only rows of runs that are there")
    parser.add_argument("--into", type=Path, help=f"a page with {START} and {END}")
    return parser.parse_args()


def net_rows(name: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the rows of one network: a probed rate for each seed, a given one for the first."""
    inputs = make_inputs(name, options.data, options.weights, options.work)
    rate = f"optimizer.rates.qat_lr={options.given}"
    runs = [(seed, "probed", f"{name}_{seed}", []) for seed in options.seeds]
    runs.append((options.seeds[0], "given", f"{name}_{options.seeds[0]}_given", [rate]))
    folders = [options.work / "runs" / folder for _, _, folder, _ in runs]
    return [
        row(name, kind, train([*words(name, *inputs, seed), *more], folder))
        for (seed, kind, _, more), folder in zip(runs, folders, strict=True)
        if not options.done or (folder / "report.json").is_file()
    ]


def main() -> None:
    """Run everything and print the table, or write it into a page."""
    options = parse()
    rows = [cells for name in options.nets for cells in net_rows(name, options)]
    text = markdown(HEAD, rows)
    if options.into is None:
        show(text)
        return
    page = options.into.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    write_text(options.into, f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    with terminal():
        main()

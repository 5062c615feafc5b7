"""Runs that are killed at random moments and resumed leave the files of a run that was not.

``QAT_KILLS`` (50) kills, spread over the recipes; ``QAT_KILL_SEED`` (0) gives other moments.
"""

import os
import random
import time
from pathlib import Path

import pytest

from tests.runs import start, train
from tests.same_run import apart

KILLS = int(os.environ.get("QAT_KILLS", "50"))
SEED = int(os.environ.get("QAT_KILL_SEED", "0"))
TABLE = [
    "recipe=tabular_w8a8",
    "name=killed",
    "schedule.float_epochs=1",
    "schedule.epochs=4",
    "trainer.accelerator=cpu",
    "export.threshold=0.0",  # what is compared is two runs
]
EMA = "callbacks.ema={_target_: qat.training.callbacks.EMA, decay: 0.8}"
BITS = "callbacks.size_penalty={_target_: qat.training.callbacks.SizePenalty, weight: 0.05}"
RECIPES = {
    "plain": [],
    "ema": [EMA],
    "pruning": ["pruning=two_of_four"],
    "learned_bits": ["quantizer=learned_bits", BITS],
    "distillation": ["distillation=logits"],
    "two_processes": ["trainer=ddp", "trainer.devices=2"],
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, tmp_path_factory) -> tuple[str, Path, float]:
    """Return a recipe's name, the folder of its unkilled run, and the seconds that it took."""
    folder = tmp_path_factory.mktemp(request.param)
    began = time.monotonic()
    done = train(folder, *TABLE, *RECIPES[request.param])
    assert done.returncode == 0, done.stderr
    (run,) = folder.glob("runs/killed/*")
    return request.param, run, time.monotonic() - began


def kill_after(folder: Path, command: list[str], seconds: float) -> bool:
    """Start a run and kill it; return whether it lived until then."""
    run = start(folder, *command)
    run.join(seconds)
    if run.exitcode is None:
        run.kill()
        run.join()
        return True
    assert run.exitcode == 0
    return False


@pytest.mark.parametrize("number", range(-(-KILLS // (2 * len(RECIPES)))))
def test_two_kills_leave_no_trace(number, recipe, tmp_path):
    name, whole, seconds = recipe
    command = [*TABLE, *RECIPES[name]]
    moments = random.Random(f"{SEED} {name} {number}")
    for _ in range(2):
        kill_after(tmp_path, [*command, *resume(tmp_path)], moments.uniform(0.1, 1.0) * seconds)
    done = train(tmp_path, *command, *resume(tmp_path))
    assert done.returncode == 0, done.stderr
    newest = max(tmp_path.glob("runs/killed/*"), key=lambda run: run.name)
    assert apart(whole, newest) == []


def resume(folder: Path) -> list[str]:
    """Return what goes on with the newest run, once it has a checkpoint."""
    runs = [p.parent for p in folder.glob("runs/killed/*/config.yaml")]
    newest = max(runs, default=None)
    return ["ckpt_path=last"] if newest and (newest / "checkpoints/last.ckpt").is_file() else []

"""Changed training checkpoints of ours, opened as evaluate does and resumed as ``ckpt_path`` does.

What is refused how is printed: ``pytest -s -m slow tests/campaigns/test_checkpoints.py``.
"""

import copy
import random
import sys
from pathlib import Path

import pytest
import torch

from qat.compose import compose
from qat.restore import finish, read_checkpoint, restore
from qat.run import run
from tests.campaigns.trial import Outcome, attempt, summary
from tests.mutations import VALUES, mutate, mutate_bytes
from tests.runs import train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
RUN = ["recipe=tabular_w8a8", "schedule.float_epochs=1", "schedule.epochs=2", "compile=off"]
RUN += ["trainer.accelerator=cpu", "logger=none", "callbacks.monitor=null"]
OPENED, RESUMED = 150, 60
PARTS = (
    "hyper_parameters",
    "callbacks",
    "state_dict",
    "loops",
    "optimizer_states",
    "lr_schedulers",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a run that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("run")
    done = train(folder, *RUN, "hydra.run.dir=whole", "trainer.max_epochs=2", "name=tabular_w8a8")
    assert done.returncode == 0, done.stderr
    return folder / "whole/checkpoints/last.ckpt"


def changed(content, rng: random.Random):
    """Return a checkpoint in which something was changed, and what."""
    content, part = copy.copy(content), rng.choice([*PARTS, "hyper_parameters", "a key", "nothing"])
    if part == "state_dict":
        content[part] = dict(content[part])
        name = rng.choice(sorted(content[part]))
        content[part][name] = changed_tensor(content[part][name], rng)
    elif part == "a key":
        content[rng.choice(sorted(content))] = copy.deepcopy(rng.choice(VALUES))
    elif part in content:
        content[part] = mutate(content[part], rng)
    return content, part


def changed_tensor(value, rng: random.Random):
    """Return another value for a tensor of a checkpoint."""
    return rng.choice(
        [
            value.flatten()[:-1],
            value * float("nan"),
            value.double(),
            value.to(torch.int64),
            value[None],
            torch.zeros(0),
            value.to("meta"),
            torch.zeros(1).expand(2**40),
            torch.eye(2).to_sparse(),
            None,
            "a",
            [value],
        ]
    )


def write(content, path: Path, rng: random.Random) -> str:
    """Write a changed checkpoint, whole or with damaged bytes; return what was changed."""
    new, part = changed(content, rng)
    torch.save(new, path)
    if part == "nothing":
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return "bytes"
    return part


def open_as_evaluate_does(path: Path) -> None:
    found = read_checkpoint(path)
    if found is not None:
        finish(restore(found).captured)


def check(outcomes: dict[str, Outcome], folder: Path) -> None:
    sys.stdout.write(summary(outcomes) + "\n")
    assert not [o for o in outcomes.values() if o.end == "broken"]
    assert not (folder / "MARK").exists()


def test_opened(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, rng = torch.load(checkpoint, weights_only=True), random.Random(0)
    outcomes = {}
    for i in range(OPENED):
        part = write(content, tmp_path / "last.ckpt", rng)
        outcomes[f"{i} {part}"] = attempt(lambda: open_as_evaluate_does(tmp_path / "last.ckpt"))
    check(outcomes, tmp_path)


def test_resumed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, rng = torch.load(checkpoint, weights_only=True), random.Random(1)
    outcomes = {}
    for i in range(RESUMED):
        part = write(content, tmp_path / "last.ckpt", rng)
        words = [*RUN, f"ckpt_path={tmp_path / 'last.ckpt'}", "resume_changes=allow"]
        cfg = compose(words, tmp_path / f"{i}")
        outcomes[f"{i} {part}"] = attempt(lambda cfg=cfg: run(cfg))
    check(outcomes, tmp_path)

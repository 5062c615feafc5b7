"""A run that was killed in mid-epoch and resumed ends as one that was never killed, bit for bit."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from qat.compose import compose
from qat.run import run
from tests.runs import SMALL, train
from tests.same_run import apart

EVERY_STEP = "+callbacks.last.every_n_train_steps=1"
EMA = "_target_: qat.training.callbacks.EMA, decay: 0.8"
STEPS = {"float": 5, "quantize": 13, "fold": 25}  # 9 batches an epoch: 9 float, 18 quantized


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs" / "small").iterdir()
    return run


@pytest.fixture(scope="module", params=["off", pytest.param("regional", marks=pytest.mark.slow)])
def small(request) -> list[str]:
    return [*SMALL, f"compile={request.param}", EVERY_STEP.lstrip("+")]


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, *small)
    assert done.returncode == 0, done.stderr
    return only_run(folder)


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=() if p == "quantize" else pytest.mark.slow) for p in STEPS]
)
def test_killed_and_resumed_is_bit_identical(phase, small, whole, tmp_path):
    kill = f"{{_target_: tests.runs.KillAt, step: {STEPS[phase]}, mark: '{tmp_path}/mark'}}"
    command = [*small, f"+callbacks.kill={kill}"]
    died = train(tmp_path, *command)
    assert died.returncode == -9, died.stderr
    saved = torch.load(only_run(tmp_path) / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == STEPS[phase]
    assert saved["epoch"] * 9 < STEPS[phase] < (saved["epoch"] + 1) * 9
    again = "checkpointing=auto"  # computing things twice changes no bit of the rest of the run
    resumed = train(tmp_path, *command, "ckpt_path=last", again)
    assert resumed.returncode == 0, resumed.stderr
    check_equal(whole, only_run(tmp_path))


class StopError(Exception):
    """A stop behind the last checkpoint of the last epoch."""


class StopAtEnd(pl.Callback):
    """Stop in front of all that is done when training ends, once."""

    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.mark.exists():
            self.mark.touch()
            raise StopError


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
def test_what_is_done_when_training_ends_is_done_by_the_resumed_run(tmp_path):
    """The fold, the averages and the last share of pruning come behind the last checkpoint."""
    few = ["recipe=tabular_w8a8", "schedule.float_epochs=0", "schedule.epochs=1", "compile=off"]
    late = ["schedule.fold=1.0", "pruning=magnitude", f"callbacks.ema={{{EMA}}}"]
    stop = f"callbacks.kill={{_target_: tests.test_resume.StopAtEnd, mark: '{tmp_path}/mark'}}"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(compose([*few, *late], whole))
    with pytest.raises(StopError):
        run(compose([*few, *late, "+" + stop], stopped))
    run(compose([*few, *late, "+" + stop, "ckpt_path=last"], stopped))
    check_equal(whole, stopped)


def check_equal(whole: Path, resumed: Path) -> None:
    assert apart(whole, resumed) == []


def test_resuming_a_finished_run_changes_no_file(small, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    done = train(whole.parents[2], *small, "ckpt_path=last")
    assert done.returncode == 0, done.stderr
    assert f"this run has finished; artifact and report in {whole}" in done.stdout
    assert only_run(whole.parents[2]) == whole
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


REESTIMATE = "_target_: qat.training.callbacks.ReestimateBatchNorm, num_batches: 2"
AIDS = [
    "scheme=w2a2",
    "optimizer=sam",
    "oscillations=freeze",
    "oscillations.momentum=0.2",
    "distillation=features",
    f"callbacks.ema={{{EMA}}}",
    f"callbacks.reestimate_batch_norm={{{REESTIMATE}, every_validation: true}}",
    "export.threshold=0.0",  # what is compared is two runs
]


@pytest.mark.slow
def test_a_run_with_every_training_aid_resumes_in_mid_epoch(tmp_path):
    command = [*SMALL, EVERY_STEP.lstrip("+"), *AIDS]
    folders = [tmp_path / name for name in ("whole", "killed")]
    done = train(folders[0], *command)
    assert done.returncode == 0, done.stderr
    kill = f"+callbacks.kill={{_target_: tests.runs.KillAt, step: 22, mark: '{tmp_path}/mark'}}"
    assert train(folders[1], *command, kill).returncode == -9
    resumed = train(folders[1], *command, kill, "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    check_equal(*map(only_run, folders))
    callbacks = [
        torch.load(only_run(folder) / "checkpoints/last.ckpt", weights_only=True)["callbacks"]
        for folder in folders
    ]
    for found in callbacks[0]["FreezeOscillations"]["found"]:
        histories = [saved["FreezeOscillations"]["found"][found] for saved in callbacks]
        assert all(torch.equal(histories[0][k], histories[1][k]) for k in histories[0])
    assert any(h["frozen"].any() for h in callbacks[0]["FreezeOscillations"]["found"].values())


@pytest.mark.slow
def test_a_run_killed_between_two_widths_resumes_exactly(tmp_path):
    bits = ["scheme=w2a2", "schedule.bits={8: 0.0, 4: 0.2, 2: 0.5}", "export.threshold=0.0"]
    command = [*SMALL, EVERY_STEP.lstrip("+"), *bits]
    folders = [tmp_path / name for name in ("whole", "killed")]
    done = train(folders[0], *command)
    assert done.returncode == 0, done.stderr
    kill = f"+callbacks.kill={{_target_: tests.runs.KillAt, step: 16, mark: '{tmp_path}/mark'}}"
    assert train(folders[1], *command, kill).returncode == -9
    assert train(folders[1], *command, kill, "ckpt_path=last").returncode == 0
    check_equal(*map(only_run, folders))


@pytest.mark.slow
def test_a_run_that_learns_from_kept_logits_and_dies_twice_resumes_exactly(tmp_path):
    kept = ["distillation.cache=true", "data.augment=none"]
    command = [*SMALL, EVERY_STEP.lstrip("+"), *kept]
    folders = [tmp_path / name for name in ("whole", "killed")]
    done = train(folders[0], *command)
    assert done.returncode == 0, done.stderr
    for phase in ("quantize", "fold"):
        kill = f"_target_: tests.runs.KillAt, step: {STEPS[phase]}, mark: '{tmp_path}/{phase}'"
        command.append(f"+callbacks.kill_{phase}={{{kill}}}")
    assert train(folders[1], *command).returncode == -9
    assert train(folders[1], *command, "ckpt_path=last").returncode == -9
    resumed = train(folders[1], *command, "ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr
    check_equal(*map(only_run, folders))

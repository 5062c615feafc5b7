"""What the best checkpoint and early stopping look at; the best goes with its run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from qat.training.callbacks import Calibrate, QuantizedCheckpoint, QuantizedEarlyStopping
from qat.training.schedule import Schedule
from tests.helpers import calibrate
from tests.training.small import Data, Save, fit, make_task


def make(folder):
    return QuantizedCheckpoint(dirpath=folder, filename="best", monitor="accuracy", mode="max")


@pytest.fixture
def saved(tmp_path):
    """The state of a callback that has saved its best."""
    first, path = make(tmp_path / "old"), tmp_path / "old" / "best.ckpt"
    path.parent.mkdir()
    path.write_text("best")
    score = torch.tensor(90.0)
    first.best_k_models = {str(path): score}
    first.best_model_path = first.kth_best_model_path = str(path)
    first.best_model_score = first.kth_value = first.current_score = score
    return first.state_dict()


@pytest.mark.parametrize("place", ["old", "copied/else/where", "made", "moved"])
def test_the_best_goes_with_the_run(place, saved, tmp_path):
    folder = tmp_path / place
    if place == "made":
        folder.mkdir()
    elif place == "moved":
        (tmp_path / "old").rename(folder)
    again = make(folder)
    again._resumed = folder if place == "moved" else tmp_path / "old"  # as setup finds it
    again.load_state_dict(saved)
    path = folder / "best.ckpt"
    assert path.read_text() == "best"
    assert again.state_dict() == {
        **saved,
        "dirpath": str(folder),
        "best_model_path": str(path),
        "kth_best_model_path": str(path),
        "best_k_models": {str(path): torch.tensor(90.0)},
    }


def test_a_run_knows_beside_which_checkpoint_it_resumes(tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(ModelCheckpoint, "setup", lambda *args: seen.append(args[-1]))
    callback, task = make(tmp_path), make_task()
    for resumed, folder in ((None, None), (tmp_path / "a/last.ckpt", tmp_path / "a")):
        trainer: Any = SimpleNamespace(ckpt_path=resumed)
        callback.setup(trainer, task, "fit")
        assert callback._resumed == folder
    assert seen == ["fit", "fit"]  # Lightning finds its own folder there


def test_without_its_file_the_best_starts_anew(saved, tmp_path):
    Path(saved["best_model_path"]).unlink()
    again = make(tmp_path / "old")
    again.load_state_dict(saved)
    assert again.best_model_score is None
    assert again.best_k_models == {}


def test_no_file_of_another_folder_is_taken_for_the_best(saved, tmp_path):
    """A state names a path; only its name counts, beside the checkpoint that is resumed."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/best.ckpt").write_text("mine")
    again = make(tmp_path / "new")
    again._resumed = tmp_path / "elsewhere"
    again.load_state_dict({**saved, "best_model_path": str(tmp_path / "secret/best.ckpt")})
    assert not (tmp_path / "new/best.ckpt").exists()
    assert again.best_model_score is None


@pytest.mark.parametrize("kind", [QuantizedCheckpoint, QuantizedEarlyStopping])
def test_the_metric_of_a_float_model_does_not_count(kind, monkeypatch):
    seen: list[Any] = []
    for base in (ModelCheckpoint, EarlyStopping):
        monkeypatch.setattr(base, "on_validation_end", lambda *args: seen.append(args[-1]))
    callback, task, trainer = kind(), make_task(), Any
    callback.on_validation_end(trainer, task)
    assert not seen
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    callback.on_validation_end(trainer, task)
    assert seen == [task]


def test_training_stops_where_the_quantized_accuracy_no_longer_rises():
    task = make_task(schedule=Schedule(float_epochs=1, epochs=4))
    stop = QuantizedEarlyStopping(patience=2, min_delta=100.0)
    fit(task, Calibrate(2), stop)
    assert stop.stopped_epoch == 3  # the first quantized epoch is the second; two more do not rise
    least = QuantizedEarlyStopping()
    assert least.monitor_op(torch.tensor(50.01) - least.min_delta, torch.tensor(50.0))
    assert least.patience == 10


def test_a_run_that_resumes_where_it_had_stopped_trains_no_further(tmp_path):
    """Killed behind its last checkpoint, and in front of the artifact."""
    path = tmp_path / "last.ckpt"
    stopped = fit(make_task(), Calibrate(2), QuantizedEarlyStopping(1, 100.0), Save(path))
    again = fit(make_task(), Calibrate(2), QuantizedEarlyStopping(1, 100.0), resume=path)
    assert again.global_step == stopped.global_step == 16

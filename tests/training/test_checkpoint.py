"""The best checkpoint stays the best when its run goes on, also in another folder."""

from pathlib import Path

import pytest
import torch

from qat.training.callbacks import QuantizedCheckpoint


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


@pytest.mark.parametrize("place", ["old", "copied elsewhere", "moved"])
def test_the_best_goes_with_the_run(place, saved, tmp_path):
    folder = tmp_path / place
    if place == "moved":
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

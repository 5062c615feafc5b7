"""What callbacks do when training ends is done once, also by a run that resumes behind its end."""

from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from qat.training.ending import Ending
from tests.training.small import fit, make_task


class Count(pl.Callback):
    """Count how often training ends; keep the checkpoint of the last epoch, from before that."""

    def __init__(self, path):
        self.path, self.ends = path, 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ends += 1


def loops(trainer: pl.Trainer, path) -> Any:
    """Return where the loops stand in a checkpoint that is saved now."""
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)["loops"]


def test_a_run_that_resumes_behind_its_last_batch_ends_once(tmp_path):
    last, now = tmp_path / "last.ckpt", tmp_path / "now.ckpt"
    task, whole, count = make_task(), Ending(), Count(last)
    trainer = fit(task, count, whole, epochs=1)
    assert whole.state_dict() == {"done": True}
    assert not whole.catch_up(trainer, task)
    assert count.ends == 1
    expected = loops(trainer, now)

    task, late, count = make_task(), Ending(), Count(now)
    trainer = fit(task, count, late, resume=last, epochs=1)
    assert (late.done, count.ends) == (False, 0)  # Lightning skips the loop, and its end
    assert late.catch_up(trainer, task)
    assert (late.done, count.ends) == (True, 1)
    assert not late.catch_up(trainer, task)
    assert count.ends == 1
    assert loops(trainer, now) == expected
    late.load_state_dict({"done": False})
    assert not late.done


def test_where_nothing_is_trained_nothing_ends(tmp_path):
    count = Count(tmp_path / "unused.ckpt")
    trainer: Any = SimpleNamespace(max_epochs=0, callbacks=[count])
    assert not Ending().catch_up(trainer, make_task())
    assert count.ends == 0


def test_a_progress_bar_that_has_not_started_does_not_end(tmp_path):
    count = Count(tmp_path / "unused.ckpt")
    trainer: Any = SimpleNamespace(max_epochs=1, callbacks=[TQDMProgressBar(), count])
    assert Ending().catch_up(trainer, make_task())
    assert count.ends == 1

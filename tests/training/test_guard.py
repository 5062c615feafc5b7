"""A loss that is not finite stops a run; every batch has random numbers of its own."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from qat.errors import ConfigError, TrainingError
from qat.training.callbacks import SeedSteps, StopOnNonFinite


def look(outputs: Any, *paths: str) -> None:
    """Show a batch's outputs to the guard of a run that has kept the checkpoints at ``paths``."""
    checkpoints = [ModelCheckpoint() for _ in paths]
    for checkpoint, path in zip(checkpoints, paths, strict=True):
        checkpoint.best_model_path = path
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[object(), *checkpoints], current_epoch=3)
    StopOnNonFinite().on_train_batch_end(trainer, Any, outputs, None, 7)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss):
    for outputs in (torch.tensor(loss), {"loss": torch.tensor(loss)}):
        with pytest.raises(TrainingError, match=r"epoch 3, batch 7: .* is kept \(best\.ckpt\)"):
            look(outputs, "", "best.ckpt", "other.ckpt")
    with pytest.raises(TrainingError, match=r"is kept \(none yet\)"):
        look(torch.tensor(loss))


def test_a_finite_loss_or_none_goes_on():
    look(torch.tensor(1e30))
    look({"loss": torch.tensor(0.0)})
    look(None)  # of a batch that Lightning skipped


def test_every_batch_of_every_epoch_rank_and_seed_draws_its_own():
    def draw(seed, epoch, batch, rank):
        trainer: Any = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        SeedSteps(seed).on_train_batch_start(trainer, Any, None, batch)
        return torch.initial_seed()

    places = [*product(range(2), range(3), range(10), range(2))]
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn == [draw(*place) for place in places]


def test_a_seed_is_a_whole_number():
    SeedSteps(0)
    assert SeedSteps().seed == 0
    with pytest.raises(ConfigError, match=r"callbacks\.seed_steps\.seed .* got -1"):
        SeedSteps(-1)

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from qat.batch_norm import Stage, batch_norms, freeze_batch_norm
from qat.errors import ConfigError
from qat.fake_quant import fake_quants
from qat.layers import quantized_layers
from qat.training.callbacks import Calibrate, FreezeBatchNorm, ReestimateBatchNorm
from qat.training.callbacks.reestimate import reestimate
from tests.helpers import calibrate
from tests.training.small import Data, Save, fit, make_task, same


def norm_of(task) -> Any:
    return batch_norms(task.model)[0]


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
def test_statistics_are_the_mean_over_batches_of_the_quantized_model(batch_norm):
    task, x = make_task(2, batch_norm=batch_norm), Data().x
    with torch.no_grad():
        norm_of(task).running_var.uniform_(0.5, 2.0)
        norm_of(task).running_mean.normal_()
    calibrate(task.model, x)  # pyright: ignore[reportArgumentType]
    layer = next(layer for _, layer in quantized_layers(task.model))
    source: Any = layer.links.input_quant
    with torch.no_grad():
        made = [F.conv2d(source(part), layer.weight) for part in x.split(16)]
    assert reestimate(task.model, list(x.split(16))) == 1
    mean = torch.stack([y.mean((0, 2, 3)) for y in made]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in made]).mean(0)
    # sums in another order
    torch.testing.assert_close(norm_of(task).running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm_of(task).running_var, variance, rtol=1e-5, atol=1e-6)


def test_everything_else_stays_as_it_was():
    task, x = (
        make_task(2, quantizer={"quantizer": "uniform", "observer": "moving_average"}),
        Data().x,
    )
    calibrate(task.model, x)  # pyright: ignore[reportArgumentType]
    task.model.train()
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    reestimate(task.model, [x])
    after = task.model.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert moved == {"1.running_mean", "1.running_var"}
    assert norm_of(task).momentum == 0.1
    assert all(m.training for m in task.model.modules())


def test_only_live_batch_norms_move():
    task = make_task(2)
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    freeze_batch_norm(task.model)
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    assert reestimate(task.model, [Data().x]) == 0
    assert all(torch.equal(v, task.model.state_dict()[k]) for k, v in before.items())


class Watch(pl.Callback):
    """Note the running mean, and whether it may move, in front of every step and validation."""

    def __init__(self):
        self.steps: list[Any] = []
        self.validations: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.steps.append((norm_of(pl_module).stage, norm_of(pl_module).running_mean.clone()))

    def on_validation_start(self, trainer, pl_module):
        self.validations.append(norm_of(pl_module).running_mean.clone())


def test_it_acts_once_in_front_of_the_freeze():
    task, watch = make_task(2), Watch()
    fit(task, Calibrate(2), ReestimateBatchNorm(3), FreezeBatchNorm(), watch)
    frozen = [mean for stage, mean in watch.steps if stage is Stage.FROZEN]
    assert len(frozen) == 40 - round(0.66 * 40)
    assert all(torch.equal(mean, frozen[0]) for mean in frozen)
    plain, other = make_task(2), Watch()
    fit(plain, Calibrate(2), FreezeBatchNorm(), other)
    start = round(0.66 * 40)
    assert torch.equal(watch.steps[start - 1][1], other.steps[start - 1][1])
    assert not torch.equal(watch.steps[start][1], other.steps[start][1])


def test_every_validation_sees_fresh_statistics():
    task, watch = make_task(2), Watch()
    fit(task, Calibrate(2), ReestimateBatchNorm(3, every_validation=True), watch, epochs=1)
    assert all(f.active for f in fake_quants(task.model))
    again = norm_of(task).running_mean.clone()
    assert torch.equal(watch.validations[0], again)
    reestimate(task.model, Data().calibration_batches(3))
    assert torch.equal(norm_of(task).running_mean, again)


def test_a_resumed_run_ends_like_one_that_was_not_cut(tmp_path):
    def make():
        return [Calibrate(2), ReestimateBatchNorm(3, every_validation=True), FreezeBatchNorm()]

    whole, resumed = make_task(2), make_task(2)
    fit(whole, *make(), Save(tmp_path / "cut.ckpt"))
    fit(resumed, *make(), resume=tmp_path / "cut.ckpt")
    assert same(whole.model, resumed.model)


def test_no_batches():
    with pytest.raises(ConfigError, match=r"num_batches .* at least 1, got 0"):
        ReestimateBatchNorm(0)


def test_ranks_agree(two_ranks):
    saved = two_ranks(
        """
        from qat.training.callbacks.reestimate import reestimate
        from qat.batch_norm import batch_norms
        from tests.helpers import calibrate
        from tests.training.small import Data, make_task
        task, x = make_task(2), Data().x
        calibrate(task.model, x)
        for norm in batch_norms(task.model):
            norm.synchronised = True
        reestimate(task.model, [x[rank * 32:][:32]])
        torch.save(task.model.state_dict(), out)
        """
    )
    task, x = make_task(2), Data().x
    calibrate(task.model, x)  # pyright: ignore[reportArgumentType]
    reestimate(task.model, [x])
    for key, value in task.model.state_dict().items():
        assert torch.equal(saved[0][key], saved[1][key])
        torch.testing.assert_close(saved[0][key], value)  # sums in another order

"""Progressive lowering: who has how many bits when, fresh ranges, and errors."""

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qat.errors import ConfigError, SpecError
from qat.fake_quant import (
    FakeQuant,
    Phase,
    activation_quants,
    fake_quants,
    make_fake_quant,
    weight_quants,
)
from qat.observers import OBSERVERS
from qat.quantizers import QUANTIZERS
from qat.spec import QuantSpec
from qat.training.callbacks import Calibrate, Fold, FreezeBatchNorm, FreezeObservers, LowerBits
from qat.training.callbacks.calibrate import observe
from qat.training.callbacks.lower_bits import widths
from qat.training.optim import Rates, rate_factor
from qat.training.schedule import Schedule
from tests.helpers import calibrate as calibrate_model
from tests.training.small import EPOCHS, STEPS, Data, Save, fit, make_task, same

SCHEDULE = Schedule(float_epochs=1, epochs=1, bits={8: 0.0, 4: 0.2, 2: 10})


def test_bits_of_every_step():
    found = [SCHEDULE.least_bits(step, 200) for step in range(200)]
    assert found == [8] * 110 + [2] * 90  # 2 from 10 steps behind the start on, in front of 4 at 20
    later = Schedule(bits={8: 0.1, 3: 0.4}, freeze_observers=0.4)
    assert [later.least_bits(step, 10) for step in range(10)] == [8] * 4 + [3] * 6
    assert Schedule().least_bits(3, 10) is None


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({4: 0.0, 8: 0.2}, "from many bits to few"),
        ({8: 0.5, 4: 0.2}, r"schedule\.bits\.8 <= schedule\.bits\.4, got 0\.5 > 0\.2"),
        ({8: 0.0, 4: 0.6}, r"schedule\.bits\.4 <= schedule\.freeze_observers, got 0\.6 > 0\.5"),
        ({8: 0.0, 4: 1.5}, r"schedule\.bits .* fraction from 0\.0 to 1\.0 .*1\.5"),
        ({"8": 0.0}, "whole number from 1 to 16"),
    ],
)
def test_orders_that_make_no_sense(bits, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(bits=bits)


def test_the_cosine_starts_anew_where_bits_are_lowered():
    schedule = Schedule(bits={8: 0.0, 2: 0.5})
    rates = Rates(lr=0.1, qat_lr=0.01, restart=True)
    found = [rate_factor(step, 100, schedule, rates) for step in (0, 25, 50, 75)]
    assert found == pytest.approx([0.1, 0.05, 0.1, 0.05])
    assert rate_factor(50, 100, schedule, Rates(lr=0.1, qat_lr=0.01)) == pytest.approx(0.05)


def site(word, bits, *, observer="min_max", has_batch=False):
    spec = QuantSpec(bits, signed=True)
    return make_fake_quant(
        "site", spec, (4, 6), quantizer=word, observer=observer, has_batch=has_batch
    )


def test_no_site_gets_fewer_bits_than_its_own():
    quants = [site("lsq", bits) for bits in (8, 4, 2)]
    assert [*widths(quants, 3).values()] == [8, 4, 3]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("word", ["lsq", "lsq_plus", "uniform", "ewgs", "dsq", "tqt", "dorefa"])
def test_lowered_in_steps_it_is_what_it_would_be_from_the_start(word, observer):
    x = torch.randn(4, 6)
    lowered, own = (site(word, 2, observer=observer) for _ in range(2))
    for bits in (8, 4, 2):
        lowered.use_bits(bits)
        calibrate(lowered, x)
        assert lowered.bits == bits
        assert lowered.quantizer.codes(x).unique().numel() > bits - 1
    calibrate(own, x)
    assert torch.equal(lowered.quantizer(x), own.quantizer(x))


class Watch(pl.Callback):
    """What every site is like at every step, behind everything else that happens there."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        quants = weight_quants(pl_module.model) + activation_quants(pl_module.model)
        self.seen.append([(quant.bits, quant.phase) for quant in quants])


def run(folder, *more, resume=None):
    schedule = Schedule(
        0, EPOCHS, bits={8: 0.0, 4: 10, 2: 18}, freeze_observers=0.75, freeze_batch_norm=0.75
    )
    task = make_task(2, schedule)
    milestones = [LowerBits(2), Calibrate(2), FreezeObservers(), FreezeBatchNorm(), Fold()]
    fit(task, *milestones, *more, Save(folder / "mid.ckpt"), resume=resume)
    return task


def test_the_bits_fall_with_the_schedule_and_every_width_learns(tmp_path):
    watch = Watch()
    task = run(tmp_path, watch)
    assert [{bits for bits, _ in sites} for sites in watch.seen] == (
        [{8}] * 10 + [{4}] * 8 + [{2}] * (STEPS - 18)
    )
    phases = [{phase for _, phase in sites} for sites in watch.seen]
    assert phases == [{Phase.QUANTIZE}] * 30 + [{Phase.FROZEN}] * 10
    assert {quant.bits for quant in fake_quants(task.model)} == {2}


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on resuming inside an epoch
def test_resumed_between_two_widths_it_is_the_same_run(tmp_path):
    whole = run(tmp_path)
    resumed = run(tmp_path, resume=tmp_path / "mid.ckpt")
    assert same(whole, resumed)


def at_8_bits():
    """A calibrated task whose sites have 8 of their 2 bits."""
    task = make_task(2, Schedule(0, EPOCHS, bits={8: 0.0, 4: 10, 2: 18}, freeze_observers=20))
    task.total_steps, quants = STEPS, [*weight_quants(task.model), *activation_quants(task.model)]
    for quant in quants:
        quant.use_bits(8)
    calibrate_model(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    return task, quants


def test_what_gets_fewer_bits_is_observed_again_without_momentum(caplog):
    task, quants = at_8_bits()
    learned = [p for quant in quants for p in quant.quantizer.parameters()]
    optimizer: Any = SimpleNamespace(state=dict.fromkeys(task.model.parameters(), "momentum"))
    trainer: Any = SimpleNamespace(
        global_step=10, optimizers=[optimizer], datamodule=Data(), is_global_zero=True
    )
    with caplog.at_level("INFO", "qat"):
        for _ in range(2):  # the second time, nothing is left to do
            LowerBits(3).on_train_batch_start(trainer, task, None, 0)
        trainer.is_global_zero = False
        trainer.global_step = 18
        LowerBits(3).on_train_batch_start(trainer, task, None, 0)
    assert caplog.messages == ["step 10: 4 bits or more"]
    assert optimizer.state.keys() == set(task.model.parameters()) - set(learned)
    twin, others = at_8_bits()
    batches = Data().calibration_batches(3)
    for quant in others:
        quant.use_bits(2)
    observe(twin.model, weight_quants(twin.model), batches[:1])
    observe(twin.model, activation_quants(twin.model), batches)
    for quant, other in zip(quants, others, strict=True):
        assert torch.equal(quant.quantizer.scale, other.quantizer.scale), quant.site


class Stop(pl.Callback):
    """End the run after its first epoch."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True


def test_a_run_that_ends_early_ends_with_the_bits_of_the_scheme():
    task = make_task(2, Schedule(0, EPOCHS, bits={8: 0, 4: 10, 2: 18}, freeze_observers=20))
    fit(task, Stop(), LowerBits(2), Calibrate(2), FreezeObservers())  # 8 steps
    found = {(quant.bits, quant.phase) for quant in fake_quants(task.model)}
    assert found == {(2, Phase.FROZEN)}


def test_a_schedule_that_stays_above_the_scheme_is_refused():
    task = make_task(2, Schedule(0, EPOCHS, bits={8: 0.0, 4: 10}))
    with pytest.raises(ConfigError, match="to end at the 2 bits of the scheme"):
        fit(task, LowerBits(), Calibrate(2))


def calibrate(quant: FakeQuant, x: torch.Tensor) -> None:
    quant.train()
    quant.observer.reset()
    quant.observer.observe(x)
    quant.finish_calibration()


def test_a_checkpoint_knows_the_bits():
    quant, fresh = site("lsq", 2), site("lsq", 2)
    quant.use_bits(8)
    calibrate(quant, torch.randn(4, 6))
    fresh.load_state_dict(quant.state_dict())
    x = torch.randn(4, 6)
    assert fresh.bits == fresh.observer.spec.bits == 8
    assert torch.equal(fresh.quantizer(x), quant.quantizer(x))
    fresh.set_extra_state(torch.tensor([2, 1], dtype=torch.uint8))  # of an older run
    assert fresh.bits == fresh.observer.spec.bits == 2
    other = site("lsq", 4)
    other.load_state_dict(site("lsq", 2).state_dict())  # another scheme, given afterwards
    assert other.bits == 4


def test_widths_that_a_quantizer_does_not_have():
    with pytest.raises(SpecError, match=r"APoT.*2 to 6 bits"):
        site("apot", 2).use_bits(8)
    spec = QuantSpec(2, signed=False)
    with pytest.raises(SpecError, match="N2UQ, whose parameters depend on them"):
        QUANTIZERS["n2uq"](spec, (), has_batch=True).use_bits(4)

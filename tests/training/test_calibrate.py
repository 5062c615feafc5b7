import warnings
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat.errors import CalibrationError, ConfigError
from qat.fake_quant import FakeQuant, Phase, activation_quants, make_fake_quant, weight_quants
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.initialise import Initialiser
from qat.layers import QuantizedLayer
from qat.spec import QuantSpec
from qat.training.callbacks.calibrate import Calibrate, CalibrateActivations, observe
from qat.training.evaluate import evaluate
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import make_scheme


@pytest.fixture
def captured():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    return prepare(model, make_scheme(2, 8), torch.randn(4, 6))[0]


def quant_of(model, site) -> FakeQuant:
    return next(m for m in model.modules() if isinstance(m, FakeQuant) and m.site == site)


def test_statistics_do_not_move_and_the_mode_comes_back(captured):
    before = {
        k: v.clone() for k, v in captured.state_dict().items() if "running" in k or "num" in k
    }
    assert len(before) == 3
    for training in (True, False):
        captured.train(training)
        observe(captured, weight_quants(captured), [torch.randn(16, 6)])
        observe(captured, activation_quants(captured), [torch.randn(16, 6)] * 3)
        assert all(m.training is training for m in captured.modules())
    after = captured.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_activations_are_observed_behind_quantized_weights(captured):
    x = torch.randn(64, 6)
    observe(captured, weight_quants(captured), [x])
    observe(captured, activation_quants(captured), [x[:32], x[32:]])
    layer = captured.get_submodule("0")
    assert isinstance(layer, QuantizedLayer)
    raw, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert isinstance(raw, nn.Parameter)
    captured.eval()
    norm, site = captured.get_submodule("1"), quant_of(captured, "2")
    with torch.no_grad():
        quantized = norm(nn.functional.linear(x, layer.weight, bias)).max()
        plain = norm(nn.functional.linear(x, raw, bias)).max()
    assert site.observer.high.item() == quantized.item() != plain.item()
    assert site.quantizer.scale.item() == pytest.approx(quantized.item() / 255)
    source = quant_of(captured, "input.input")
    assert (source.observer.low, source.observer.high) == (x.min(), x.max())


def test_everything_quantizes_afterwards(captured):
    x = torch.randn(64, 6)
    observe(captured, weight_quants(captured), [x])
    assert {f.phase for f in weight_quants(captured)} == {Phase.QUANTIZE}
    assert {f.phase for f in activation_quants(captured)} == {Phase.FLOAT}
    observe(captured, activation_quants(captured), [x])
    assert {f.phase for f in activation_quants(captured)} == {Phase.QUANTIZE}
    assert all(f.calibrated for f in activation_quants(captured))


def test_no_batches(captured):
    with pytest.raises(CalibrationError, match="num_batches"):
        observe(captured, weight_quants(captured), [])


def test_a_site_that_is_never_reached(captured):
    lost = make_fake_quant(
        "lost", QuantSpec(8), (4,), quantizer="uniform", observer="min_max", has_batch=True
    )
    with pytest.raises(CalibrationError, match="'lost'"):
        observe(captured, [lost], [torch.randn(4, 6)])


def test_data_that_is_not_finite(captured):
    x = torch.randn(4, 6)
    x[1, 2] = float("nan")
    with pytest.raises(CalibrationError, match=r"input\.input.*NaN"):
        observe(captured, activation_quants(captured), [x])


def test_calibration_makes_no_gradients(captured):
    observe(captured, activation_quants(captured), [torch.randn(4, 6)])
    assert all(p.grad is None for p in captured.parameters())
    assert all(not q.observer.low.requires_grad for q in activation_quants(captured))


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(64, 6, generator=generator)
        self.y = torch.randint(0, 3, (64,), generator=generator)
        self.asked: list[int] = []

    def _loader(self) -> Any:
        return DataLoader(TensorDataset(self.x, self.y), 8)

    def train_dataloader(self) -> Any:
        return self._loader()

    def val_dataloader(self) -> Any:
        return self._loader()

    def test_dataloader(self) -> Any:
        return self._loader()

    def calibration_batches(self, num: int) -> list[torch.Tensor]:
        self.asked.append(num)
        return list(self.x.split(8)[:num])


class Watch(pl.Callback):
    """Note after every step how many weights and activations are on."""

    def __init__(self):
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        model: Any = pl_module.model
        kinds = (weight_quants(model), activation_quants(model))
        self.seen.append((all(f.active for f in kinds[0]), all(f.active for f in kinds[1])))


def fit(captured, schedule, callbacks):
    rates = Rates(lr=0.01, qat_lr=0.01)
    task = QATTask(captured, Plan("test"), schedule, rates, partial(torch.optim.SGD, lr=1.0))
    data = Data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer = pl.Trainer(
            max_epochs=schedule.float_epochs + schedule.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=callbacks,
        )
        trainer.fit(task, datamodule=data)
    return data


def test_callbacks_act_at_their_steps(captured):
    schedule = Schedule(float_epochs=1, epochs=1, calibrate=2, activations=5, freeze_observers=6,
                        freeze_batch_norm=7, fold=8)  # fmt: skip
    watch, calibrate = Watch(), Calibrate(4)
    data = fit(captured, schedule, [watch, calibrate, CalibrateActivations(3)])
    assert watch.seen == [(False, False)] * 10 + [(True, False)] * 3 + [(True, True)] * 3
    assert data.asked == [1, 3]
    assert calibrate.float_accuracy is not None
    assert calibrate.float_accuracy == calibrate.float_val_accuracy  # the same samples here


def test_activations_come_with_the_weights_by_default(captured):
    watch, calibrate = Watch(), Calibrate(4)
    schedule = Schedule(float_epochs=1, epochs=1)
    data = fit(captured, schedule, [watch, calibrate, CalibrateActivations(3)])
    assert watch.seen == [(False, False)] * 8 + [(True, True)] * 8
    assert data.asked == [1, 4]
    twin = Calibrate()
    twin.load_state_dict(calibrate.state_dict())
    assert (twin.done, twin.scores) == (True, calibrate.scores)
    assert twin.float_val_accuracy == calibrate.float_val_accuracy
    assert list(twin.scores) == ["float", "post_training"]


class Look(Initialiser):
    """Note what quantizes, and how many batches it is shown."""

    def __init__(self, reads_grids, num_batches):
        super().__init__(num_batches)
        self.reads_grids = reads_grids
        self.seen: list[Any] = []

    def __call__(self, model, batches, reference):
        kinds = (weight_quants(model), activation_quants(model))
        self.seen.append((*[all(f.active for f in kind) for kind in kinds], len(batches)))
        return "looked"


@pytest.mark.parametrize("epochs", [0, 1])
def test_initialisers_act_once_around_the_calibration_of_weights(epochs, captured, caplog):
    looks = {"floats": Look(False, 2), "grids": Look(True, 3)}
    calibrate = Calibrate(1, looks)
    with caplog.at_level("INFO", "qat"):
        fit(captured, Schedule(float_epochs=0, epochs=epochs), [calibrate])
    told = [r.getMessage().split(":")[0] for r in caplog.records if r.name == "qat"]
    assert told == ["float accuracy", "looked", "looked", "post-training accuracy", "step 0"]
    assert looks["floats"].seen == [(False, False, 2)]
    assert looks["grids"].seen == [(True, False, 3)]
    assert calibrate.done
    with pytest.raises(ConfigError, match="expected floats in front of grids"):
        Calibrate(1, dict(reversed(looks.items())))


class Score(pl.Callback):
    """Evaluate in front of every batch, behind the callbacks that act there."""

    def __init__(self):
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        model: Any = pl_module.model
        self.seen.append(evaluate(model, Data().test_dataloader()))


@pytest.mark.parametrize(("activations", "step"), [(None, 8), (5, 13)])
def test_post_training_is_quantized_and_not_yet_trained(captured, activations, step):
    schedule = Schedule(float_epochs=1, epochs=1, calibrate=0, activations=activations,
                        freeze_observers=6, freeze_batch_norm=7, fold=7)  # fmt: skip
    score, calibrate = Score(), Calibrate(4)
    fit(captured, schedule, [calibrate, CalibrateActivations(4), score])
    assert calibrate.scores["post_training"] == score.seen[step]
    assert calibrate.scores["post_training"] not in (score.seen[step - 1], score.seen[step + 1])


@pytest.mark.parametrize("start", [0, 6])
def test_baseline_is_the_model_that_came_before_any_step(captured, start):
    expected = evaluate(captured, Data().test_dataloader())
    calibrate = Calibrate(1)
    schedule = Schedule(float_epochs=0, epochs=1, calibrate=start, freeze_observers=7,
                        freeze_batch_norm=7, fold=7)  # fmt: skip
    fit(captured, schedule, [calibrate])
    assert calibrate.scores["float"] == expected
    assert evaluate(captured, Data().test_dataloader()) != expected  # it did train


def test_baseline_is_measured_once(captured):
    calibrate = Calibrate(1)
    scores = {"float": [12.5, 3.5]}
    calibrate.load_state_dict({"done": False, "baseline": [12.5, 25.0], "scores": scores})
    fit(captured, Schedule(float_epochs=0, epochs=1), [calibrate])
    assert (calibrate.float_accuracy, calibrate.float_val_accuracy) == (12.5, 25.0)

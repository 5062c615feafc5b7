"""What TensorBoard and the CSV file of a real run hold."""

import csv
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from qat.errors import ConfigError
from qat.fake_quant import Phase
from qat.quantizers import LSQ, QUANTIZERS
from qat.training.callbacks import (
    Anneal,
    Calibrate,
    Fold,
    FreezeBatchNorm,
    FreezeObservers,
    Monitor,
)
from qat.training.callbacks.monitor import DASHBOARD
from tests.helpers import calibrate
from tests.runs import train
from tests.training.small import Data, make_task

LAYERS = {"linear"}
WEIGHTS = ("bits", "used_codes", "oscillating")
SITES = {"input.input", "linear.weight"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("monitored")
    options = ["schedule.float_epochs=2", "schedule.epochs=4", "schedule.calibrate=0"]
    options += ["oscillations=track"]
    done = train(path, "recipe=tabular_w8a8", *options, "hydra.run.dir=run", "export.threshold=1.0")
    assert done.returncode == 0, done.stderr[-2000:]
    return path / "run"


@pytest.fixture(scope="module")
def board(folder):
    events = EventMultiplexer(size_guidance={"scalars": 0, "histograms": 0})
    events.AddRunsFromDirectory(str(folder / "tensorboard"))
    return events.Reload()


def scalars(board, tag):
    """Step to value of a curve, over all event files of the run."""
    found = {}
    for run, kinds in board.Runs().items():
        if tag in kinds["scalars"]:
            found.update({e.step: e.value for e in board.Scalars(run, tag)})
    return found


def tags(board, kind):
    return {tag for kinds in board.Runs().values() for tag in kinds[kind]}


class Keep(Logger):
    """Keep what is logged."""

    name = version = "keep"  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self):
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.seen.append(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def fake_trainer(*loggers: Logger, **values: Any) -> Any:
    given = {"loggers": [*loggers], "callbacks": [], "datamodule": Data(), "global_step": 3}
    return SimpleNamespace(sanity_checking=False, is_global_zero=True, **{**given, **values})


def test_what_is_measured_leaves_the_model_as_it_was():
    task, keep = make_task(2), Keep()
    calibrate(task.model, Data().x)  # pyright: ignore[reportArgumentType]
    layer, raw = (cast(Any, task.model.train()).get_submodule(name) for name in ("0", "4"))
    raw.weight_quant.set_phase(Phase.FLOAT)
    raw._parameters["weight"].data[0] = 0.0
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    Monitor(5, histograms=False).on_validation_epoch_end(fake_trainer(keep), task)
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    assert all(module.training for module in task.model.modules())
    (shown,) = keep.seen
    assert shown["sparsity/0"] == (layer.weight == 0).double().mean() > 0
    assert shown["sparsity/4"] == pytest.approx(1 / 3)
    assert shown["bits/0"] == shown["bits/4"] == 2.0
    assert shown["used_codes/0"] == 1.0
    assert "used_codes/4" not in shown
    assert shown["scale/0.weight"] == layer.weight_quant.quantizer.scale.mean()


def test_there_is_nothing_to_measure_for_nobody():
    task, keep = make_task(2), Keep()
    for values in ({"sanity_checking": True}, {"is_global_zero": False}):
        trainer = fake_trainer(keep)
        vars(trainer).update(values)
        Monitor(5).on_validation_epoch_end(trainer, task)
    Monitor(5).on_validation_epoch_end(fake_trainer(datamodule=None), task)
    assert not keep.seen


@pytest.mark.parametrize("values", [{"num_samples": 0}, {"histograms": 1}])
def test_values_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=r"callbacks\.monitor\."):
        Monitor(**values)


def test_curves(board):
    seen = tags(board, "scalars")
    assert {"train/loss", "val/loss", "val/accuracy", "val/quantized_accuracy"} <= seen
    assert {f"{kind}/{s}" for kind in ("sqnr_db", "clipped", "scale") for s in SITES} <= seen
    assert {f"sparsity/{layer}" for layer in LAYERS} <= seen
    assert {f"{kind}/{layer}" for kind in WEIGHTS for layer in LAYERS} <= seen
    assert {f"scale_gradient/{layer}.weight" for layer in LAYERS} <= seen
    assert any(tag.startswith("lr") for tag in seen)
    assert {f"weight/{layer}" for layer in LAYERS} <= tags(board, "histograms")


def test_quantized_accuracy_is_logged_every_quantized_epoch_and_no_other(board):
    quantized, every = (scalars(board, f"val/{k}") for k in ("quantized_accuracy", "accuracy"))
    assert len(every) == 6
    assert len(quantized) == 4
    assert min(quantized) > sorted(every)[1]
    assert list(quantized.values()) == list(every.values())[2:]


def test_baseline_is_a_line_beside_the_quantized_accuracy(board):
    baseline = scalars(board, "val/float_baseline")
    assert len(baseline) == 4
    assert len(set(baseline.values())) == 1
    assert abs(baseline.popitem()[1] - scalars(board, "val/accuracy").popitem()[1]) < 5


def test_final_metrics_stand_with_the_hyper_parameters(board, folder):
    report = json.loads((folder / "report.json").read_text())
    for kind, value in report["accuracy"].items():
        (logged,) = scalars(board, f"final/{kind}").values()
        assert logged == pytest.approx(value)
    shown = str(board.PluginRunToTagToContent("hparams"))
    assert "optimizer.rates.lr" in shown
    assert "callbacks.monitor" not in shown


def test_csv_has_the_same_curve(board, folder):
    rows = list(csv.DictReader((folder / "csv/version_0/metrics.csv").read_text().splitlines()))
    values = [float(r["val/quantized_accuracy"]) for r in rows if r["val/quantized_accuracy"]]
    assert values == pytest.approx(list(scalars(board, "val/quantized_accuracy").values()))


def test_values_of_weights_make_sense(board):
    assert set(scalars(board, "bits/linear").values()) == {8.0}
    assert len(scalars(board, "used_codes/linear")) == 4  # quantized epochs only
    for tag in ("used_codes/linear", "oscillating/linear"):
        assert all(0 <= value <= 1 for value in scalars(board, tag).values())
    assert max(scalars(board, "used_codes/linear").values()) > 0


def test_charts_name_curves_that_there_are():
    charts = DASHBOARD["overview"].values()
    kinds = {tag.split("/")[0] for _, tags in charts for tag in tags}
    assert kinds <= {"val", "train", "sqnr_db", "clipped", "sparsity", "oscillating",
                     "used_codes", "scale_gradient", "statistics"}  # fmt: skip


class Soft(LSQ):
    """An LSQ with a temperature."""

    temperature: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("temperature", torch.tensor(5.0))

    def anneal(self, progress):
        self.temperature.fill_(progress)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers
def test_temperatures_gradients_and_statistics(monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "soft", Soft)
    task, keep = make_task(quantizer={"quantizer": "soft", "observer": "min_max"}), Keep()
    callbacks = [Anneal(), Calibrate(2), FreezeObservers(), FreezeBatchNorm(), Fold()]
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=keep,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, Monitor(8, histograms=False), watch],
    )
    trainer.fit(task, datamodule=Data())
    shown = [m for m in keep.seen if "bits/0" in m]
    assert len(shown) == 5
    assert [m["annealed/0.weight/temperature"] for m in shown] == pytest.approx(
        [7 / 20, 15 / 20, 1, 1, 1]
    )
    gradients = [m.get("scale_gradient/0.weight") for m in shown]
    assert gradients[:2] == pytest.approx(watch.norms[:2])
    assert min(watch.norms[:2]) > 0
    assert gradients[-1] is None  # frozen
    assert ["statistics/1" in m for m in shown] == [True] * 4 + [False]  # folded


class Watch(pl.Callback):
    """Note the norm of a scale's gradient behind the last step of every epoch."""

    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        model: Any = pl_module.model
        if not trainer.is_last_batch:
            return
        gradient = model.get_submodule("0").weight_quant.quantizer.learned_scale.grad
        self.norms.append(0.0 if gradient is None else float(gradient.norm()))

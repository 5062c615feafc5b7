"""What TensorBoard and the CSV file of a real run hold."""

import csv
import json

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from tests.runs import train

LAYERS = {"linear"}
SITES = {"input.input", "linear.weight"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("monitored")
    options = ["schedule.float_epochs=2", "schedule.epochs=4", "schedule.calibrate=0"]
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


def test_curves(board):
    seen = tags(board, "scalars")
    assert {"train/loss", "val/loss", "val/accuracy", "val/quantized_accuracy"} <= seen
    assert {f"{kind}/{s}" for kind in ("sqnr_db", "clipped", "scale") for s in SITES} <= seen
    assert {f"sparsity/{layer}" for layer in LAYERS} <= seen
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
    assert "callbacks" not in shown


def test_csv_has_the_same_curve(board, folder):
    rows = list(csv.DictReader((folder / "csv/version_0/metrics.csv").read_text().splitlines()))
    values = [float(r["val/quantized_accuracy"]) for r in rows if r["val/quantized_accuracy"]]
    assert values == pytest.approx(list(scalars(board, "val/quantized_accuracy").values()))

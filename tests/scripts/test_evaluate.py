import json
import shutil

import numpy as np
import pytest
import torch

from qat.assemble import set_up
from qat.data import DigitsData, TabularData
from qat.models import build
from qat.restore import read_checkpoint
from qat.training.evaluate import evaluate


def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("which", "file", "kind", "key"),
    [
        ("table_run", "checkpoints/last.ckpt", "checkpoint", "fake_quant"),
        ("table_run", "model.onnx", "onnx", "onnxruntime"),
        ("image_run", "model.onnx", "onnx", "onnxruntime"),
    ],
)
def test_accuracy_is_that_of_the_report(which, file, kind, key, request, call, tmp_path):
    folder = request.getfixturevalue(which)
    target = tmp_path / "result.json"
    status, out, error = call("evaluate", folder / file, "--json", target)
    assert (status, error) == (0, "")
    expected, perplexity = (report(folder)[what][key] for what in ("accuracy", "perplexity"))
    samples = 2000 if which == "table_run" else 500
    assert json.loads(target.read_text()) == {
        "accuracy": expected,
        "perplexity": perplexity,
        "samples": samples,
        "split": "test",
        "file": str(folder / file),
        "kind": kind,
    }
    shown = f"accuracy {expected:.2f} %, perplexity {perplexity:.3f}"
    assert f"{shown} on {samples:,} test samples" in out


def test_validation_split(table_run, call):
    status, out, _ = call("evaluate", table_run / "model.onnx", "--split", "val")
    assert status == 0
    assert "on 800 val samples" in out


def test_float_checkpoint_with_a_config(call, refuse, tmp_path):
    file = tmp_path / "float.pt"
    model = build("linear", 10, in_features=4)
    torch.save(model.state_dict(), file)
    status, out, error = call("evaluate", file, "recipe=tabular_w8a8")
    assert (status, error) == (0, "")
    expected = evaluate(model, TabularData().test_dataloader())
    shown = f"accuracy {expected.accuracy:.2f} %, perplexity {expected.perplexity:.3f}"
    assert f"{shown} on 2,000 test samples" in out
    assert "is no training checkpoint of ours" in refuse("evaluate", file)
    other = ["recipe=tabular_w8a8", "+data.num_classes=5"]
    assert "the number of classes differs" in refuse("evaluate", file, *other)


def test_checkpoint_in_its_float_phase(early_checkpoint, call):
    path = early_checkpoint(calibrated=False)
    checkpoint = read_checkpoint(path)
    assert checkpoint is not None
    setup = set_up(checkpoint.config)
    status, out, _ = call("evaluate", path)
    assert status == 0
    assert "phase float" in out
    assert f"{evaluate(setup.captured, setup.data.test_dataloader()).accuracy:.2f} %" in out


@pytest.fixture
def arrays(tmp_path):
    """Save the test digits as other data: the same images, in float."""

    def save(channels=3, classes=10):
        data = DigitsData(channels=channels)
        x, y = zip(*data.test_dataloader(), strict=True)
        x, y = torch.cat(x).numpy(), torch.cat(y).numpy() % classes
        path = tmp_path / "arrays.npz"
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        return path

    return save


def test_other_data_for_a_checkpoint(image_run, arrays, call):
    other = ["data.augment=none", f"data.path={arrays()}"]
    status, out, _ = call(
        "evaluate", image_run / "checkpoints/last.ckpt", "--data", "arrays", *other
    )
    assert status == 0
    accuracy, perplexity = (report(image_run)[k]["fake_quant"] for k in ("accuracy", "perplexity"))
    assert f"accuracy {accuracy:.2f} %, perplexity {perplexity:.3f} on 500" in out


def test_other_number_of_classes(image_run, arrays, refuse):
    other = ["data=arrays", "data.augment=none", f"data.path={arrays(classes=7)}"]
    sentence = refuse("evaluate", image_run / "checkpoints/last.ckpt", *other)
    assert "data with the 10 classes that" in sentence
    assert "got 7" in sentence
    sentence = refuse("evaluate", image_run / "model.onnx", *other)
    assert "number of classes 10, got number of classes 7" in sentence


def test_other_shape(image_run, arrays, refuse):
    other = ["data=arrays", "data.augment=none", f"data.path={arrays(channels=1)}"]
    assert "(2, 1, 8, 8)" in refuse("evaluate", image_run / "checkpoints/last.ckpt", *other)
    assert "shape [3, 8, 8], got shape [1, 8, 8]" in refuse(
        "evaluate", image_run / "model.onnx", *other
    )


def test_other_normalisation_is_not_evaluated_silently(image_run, arrays, refuse):
    other = ["data=arrays", "data.augment=none", f"data.path={arrays()}"]
    assert "mean [0.3056, 0.3056, 0.3056], got mean None" in refuse(
        "evaluate", image_run / "model.onnx", *other
    )


def test_onnx_alone_needs_data(table_run, call, refuse, tmp_path):
    file = shutil.copy(table_run / "model.onnx", tmp_path)
    assert "got neither overrides nor a config.yaml" in refuse("evaluate", file)
    assert "data.path" in refuse("evaluate", file, "data=arrays")
    status, out, _ = call("evaluate", file, "data=tabular")
    assert status == 0
    assert f"{report(table_run)['accuracy']['onnxruntime']:.2f} %" in out
    (tmp_path / "config.yaml").write_text("a: [")
    assert "the config of a run" in refuse("evaluate", file)
    (tmp_path / "config.yaml").write_text("a: 1")
    assert "without data and seed" in refuse("evaluate", file)


def test_overrides_change_the_data_of_the_run(table_run, call, refuse):
    file = table_run / "model.onnx"
    status, out, _ = call("evaluate", file, "+data.num_samples=100", "data.batch_size=10")
    assert status == 0
    assert "on 20 test samples" in out
    assert "overrides of data, recipe, seed only" in refuse("evaluate", file, "model=resnet20")
    assert "batch_siz" in refuse("evaluate", file, "data.batch_siz=10")
    assert "did you mean digits" in refuse("evaluate", file, "data=digts")


def test_wrong_files(table_run, unsafe_checkpoint, refuse, tmp_path):
    assert "correct the path" in refuse("evaluate", tmp_path / "none.ckpt")
    assert "check the path" in refuse("evaluate", tmp_path / "none.onnx")
    assert "contains Python code" in refuse("evaluate", unsafe_checkpoint)
    text = tmp_path / "text.onnx"
    text.write_text("no model")
    assert "an ONNX model that onnxruntime runs" in refuse("evaluate", text)
    assert "cannot be read" in refuse("evaluate", text.rename(tmp_path / "text.ckpt"))
    packed = table_run / "model.safetensors"
    assert "no training checkpoint of ours" in refuse("evaluate", packed)
    assert "made by another architecture" in refuse("evaluate", packed, "recipe=tabular_w8a8")


def test_result_that_cannot_be_written(table_run, call, tmp_path):
    status, _, error = call("evaluate", table_run / "model.onnx", "--json", tmp_path)
    assert status == 1
    assert error.startswith("qat: expected paths to read and write, got [Errno 21]")

"""A run of a model with several inputs and outputs: from arrays by name to a file that passes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from qat import gate
from qat.compose import compose
from qat.errors import ConfigError
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.restore import read_checkpoint, restore
from qat.run import run
from qat.runtimes.packed_model import PackedModel
from qat.training.evaluate import logits_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
SETTINGS = [
    "scheme=w8a8",
    "model=custom",
    "model._target_=tests.test_several_inputs.Net",
    "data=arrays",
    "data.augment=none",
    "data.batch_size=64",
    "schedule.float_epochs=1",
    "schedule.epochs=1",
    "trainer.accelerator=cpu",
    "callbacks.progress=null",
    "logger=none",
    "compile=off",
]


class Net(nn.Module):
    """Ids and floats; the classes are neither alone nor first."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.ids, self.floats = nn.Embedding(12, 8), nn.Linear(5, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, floats, user, unused=None):
        hidden = torch.relu(self.norm(self.ids(user) + self.floats(floats)))
        return {"hidden": hidden, "scores": self.head(hidden)}


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    random, content = np.random.default_rng(0), {}
    for split, count in (("train", 256), ("test", 96)):
        content[f"x_{split}/user"] = user = random.integers(0, 12, count)
        content[f"x_{split}/floats"] = random.normal(size=(count, 5))
        content[f"y_{split}"] = user % 3
    np.savez(path := tmp_path_factory.mktemp("data") / "a.npz", **content)
    return path


def test_a_run_ends_with_files_that_are_called_by_name(arrays, tmp_path, monkeypatch):
    run(compose([*SETTINGS, f"data.path='{arrays}'"], tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert [(x["output"], x["kind"], x["agreement"]) for x in report["outputs"]] == [
        (name, kind, 1.0) for kind in ("converted", "onnxruntime") for name in ("hidden", "scores")
    ]
    assert "| hidden | onnxruntime | 100.0000% |" in (tmp_path / "report.md").read_text()
    checkpoint = read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert checkpoint is not None
    setup = restore(checkpoint, allow=[f"{Net.__module__}.Net"])
    (batch, _), *_ = setup.data.test_dataloader()
    file, packed = OnnxModel(tmp_path / "model.onnx"), PackedModel(tmp_path / "model.safetensors")
    assert torch.equal(logits_of(file, batch).argmax(1), file(**batch)["scores"].argmax(1))
    assert torch.equal(logits_of(packed, batch).argmax(1), logits_of(file, batch).argmax(1))

    def exchange(name):
        """Let the packed model return another value under one name."""
        monkeypatch.setattr(
            gate, "PackedModel", lambda _: lambda **x: {**packed(**x), name: packed(**x)[name] + 1}
        )

    model = convert(setup.captured)
    sample = setup.captured.signature.take(batch, 8)
    difference = gate._packed_difference
    assert difference(model, tmp_path / gate.PACKED, sample) is None
    for name, shown in (("hidden", "hidden"), ("scores", "predictions")):
        exchange(name)
        assert difference(model, tmp_path / gate.PACKED, sample) == shown


@pytest.mark.parametrize(("wanted", "asked"), [("hidden", "hidden"), ("0", "0"), ("nothing", "no")])
def test_a_wrong_prediction_is_refused_before_training(arrays, tmp_path, wanted, asked):
    shown = rf"prediction={asked}.*got hidden \(N, 8\), scores \(N, 3\)"
    with pytest.raises(ConfigError, match=shown):
        run(compose([*SETTINGS, f"data.path='{arrays}'", f"prediction={wanted}"], tmp_path))
    assert not (tmp_path / "checkpoints").exists()

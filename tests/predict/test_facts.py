"""What a model says of its data is checked before it is believed."""

import numpy as np
import pytest
from onnx import TensorProto

from qat.errors import ExportError
from qat.predict.predictor import open_model
from tests.predictions import CLASSES, FACTS, SHAPE, make_model, predict


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", "cat"),
        ("classes", None),
        ("classes", [1, 2, 3, 4]),
        ("classes", ["a", "b"]),
        ("classes", [*CLASSES, "one too many"]),
        ("mean", 0.5),
        ("mean", [0.5, 0.5]),
        ("mean", ["0.5"]),
        ("mean", [True]),
        ("mean", [float("nan")]),
        ("mean", [10**400]),
        ("std", []),
        ("std", [0]),
        ("std", [-1]),
        ("std", [float("inf")]),
        ("std", [1e-46]),
    ],
)
def test_facts_that_cannot_be(key, value, tmp_path):
    path = make_model(tmp_path / "m.onnx", {**FACTS, key: value})
    with pytest.raises(ExportError, match=r"(classes|one a class|mean|std).*m.onnx'"):
        open_model(path)


@pytest.mark.parametrize(
    "how",
    [
        {"inputs": 2},
        {"outputs": 2},
        {"kind": TensorProto.INT64},
        {"shape": (3, "H", "W")},
        {"shape": (30, 40)},
    ],
)
def test_models_that_predict_no_classes_of_samples(how, tmp_path, monkeypatch):
    monkeypatch.setattr("qat.predict.facts.MOST_VALUES", 1000)
    path = make_model(tmp_path / "m.onnx", **how)
    with pytest.raises(ExportError, match=r"expected (one input|one output|an input)"):
        open_model(path)


def test_facts_that_can_be(tmp_path):
    for facts in ({"mean": None, "std": None}, {"mean": [0, 0.5, 1], "std": [1]}):
        _, read = open_model(make_model(tmp_path / "m.onnx", {**FACTS, **facts}))
        assert {key: read[key] for key in facts} == facts


def test_a_sample_without_finite_logits_is_left_out(tmp_path):
    x = np.zeros((3, *SHAPE), np.float32)
    x[1] = 3e38
    np.save(tmp_path / "x.npy", x)
    found = predict(make_model(tmp_path / "m.onnx"), tmp_path / "x.npy", "--top", "9" * 30)
    assert found.status == 0
    assert [line.partition(": ")[0][-3:] for line in found.out.splitlines()] == ["[0]", "[2]"]
    assert "x.npy[1]: expected finite logits" in found.error
    assert "\\x1b[2J" in found.out
    assert "\x1b" not in found.out

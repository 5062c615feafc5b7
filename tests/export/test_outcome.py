"""What a run says of a result that is proved and worth nothing."""

import json

import pytest
import torch
from torch import nn

from qat.artifact import Baseline, write_artifact, write_study
from qat.export.outcome import Counts, Outcome, Rate
from qat.gate import Evaluation
from qat.training.evaluate import Score
from tests.helpers import folded, make_scheme


def counts(labels, predictions, classes=10):
    found = Counts()
    found.add(torch.eye(classes)[torch.tensor(predictions)], torch.tensor(labels))
    return found


BALANCED = [*range(10)] * 100


@pytest.mark.parametrize(
    ("accuracy", "rate", "labels", "predictions", "kinds"),
    [
        ({"float": 91.0, "post_training": 88.0, "fake_quant": 90.0}, 0.02, BALANCED, BALANCED, []),
        ({"float": 88.0, "post_training": 72.8, "fake_quant": 21.9}, 0.02, BALANCED, BALANCED,
         ["below_post_training", "far_below_float"]),
        ({"float": 91.0, "post_training": 90.0, "fake_quant": 89.9}, 0.02, BALANCED, BALANCED,
         ["below_post_training"]),
        ({"float": 91.0, "post_training": 90.0, "fake_quant": 89.9}, None, BALANCED, BALANCED, []),
        ({"float": 91.0, "post_training": 91.0, "fake_quant": 91.0, "onnxruntime": 85.0}, 0.02,
         BALANCED, BALANCED, ["below_post_training", "far_below_float"]),
        ({"float": 91.0, "fake_quant": 86.0}, 0.02, BALANCED, BALANCED, []),
        ({"float": 91.0, "fake_quant": 85.9}, 0.02, BALANCED, BALANCED, ["far_below_float"]),
        ({"float": 20.0, "fake_quant": 17.5}, 0.02, BALANCED, BALANCED, ["far_below_float"]),
        ({"fake_quant": 14.6}, 0.02, BALANCED, BALANCED, []),
        ({"fake_quant": 14.5}, 0.02, BALANCED, BALANCED, ["near_chance"]),
        ({"float": 90.0, "fake_quant": 4.0}, 0.02, BALANCED, [3] * 1000,
         ["constant", "near_chance", "far_below_float"]),
        ({"float": 98.0, "fake_quant": 97.0}, 0.02, [0] * 950 + [1] * 50, [0, 1] * 500, []),
        ({"float": 98.0, "fake_quant": 95.2}, 0.02, [0] * 950 + [1] * 50, [0] * 1000,
         ["constant", "near_chance", "far_below_float"]),
        ({"float": 100.0, "fake_quant": 100.0}, 0.02, [7] * 50, [7] * 50, ["one_class"]),
        ({"float": 100.0, "fake_quant": 50.0}, 0.02, [7] * 50, [7, 3] * 25,
         ["one_class", "far_below_float"]),
        ({"fake_quant": 40.0}, 0.02, [0, 1, 2, 3] * 5, [0, 1, 2, 3] * 5, ["near_chance"]),
        ({"fake_quant": 41.0}, 0.02, [0, 1, 2, 3] * 5, [0, 1, 2, 3] * 5, []),  # 20 samples: a fifth
        ({"fake_quant": 0.0}, 0.02, [7], [3], []),  # one sample says nothing at all
    ],
)  # fmt: skip
def test_each_doubt_has_its_bound(accuracy, rate, labels, predictions, kinds):
    warnings = Outcome(accuracy, counts(labels, predictions), rate).warnings()
    assert [warning.kind for warning in warnings] == kinds
    assert all(str(w) == f"{w.text}: {w.remedy}." for w in warnings)


def test_remedies_name_the_keys():
    ruined = {"float": 88.0, "post_training": 72.8, "fake_quant": 21.9}
    first, second = map(str, Outcome(ruined, counts(BALANCED, BALANCED), 0.02).warnings())
    assert "optimizer.rates.qat_lr=0.002" in first
    assert "21.90 % is below the 72.80 %" in first
    for word in ("initialise=adaround", "distillation=logits", "num_batches", "scheme.rules"):
        assert word in second
    lost = Outcome({"float": 9.0, "fake_quant": 9.0}, counts(BALANCED, BALANCED)).warnings()
    assert "the float model guesses, too: check that ckpt" in str(lost[0])


@pytest.mark.parametrize("write", [write_artifact, write_study])
def test_report_json_and_markdown_warn(write, tmp_path):
    head = nn.Linear(16, 4)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), head)
    with torch.no_grad():
        head.bias[2] = 100.0  # one answer for all
    x, y = torch.randn(64, 6), torch.arange(64) % 4
    captured, plan = folded(model, make_scheme(8, 8), x)
    scores = {"float": Score(90.0, 1.5), "post_training": Score(80.0, 1.6)}
    rate = Rate(0.0005, {0.02: float("inf"), 0.0005: 0.25}, 0.5)
    facts = {"name": "tiny", "classes": list("abcd")}
    baseline, evaluation = Baseline(scores, 1000, rate), Evaluation([(x, y)])
    report = write(captured, plan, tmp_path, evaluation, baseline, description=facts)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["passed"] is (True if write is write_artifact else None)
    kinds = ["constant", "near_chance", "below_post_training", "far_below_float"]
    assert [warning["kind"] for warning in found["warnings"]] == kinds
    tried = {"0.02": None, "0.0005": 0.25}
    assert found["learning_rate"] == {"first": 0.0005, "tried": tried, "untrained": 0.5}
    text = (tmp_path / "report.md").read_text()
    assert text.splitlines()[0] == f"# tiny: {report.verdict}"
    assert report.verdict.endswith(", with warnings")
    assert text.count("**Warning:** ") == 4
    assert "the model answers class 2 for all 64 samples: " in text

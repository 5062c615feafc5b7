import json

import pytest
import torch
from torch import nn

from qat.artifact import Baseline, write_artifact
from qat.errors import VerificationError
from qat.export.packed import load_packed
from qat.export.report import LayerRow, Report, float_bytes, layer_rows
from qat.export.runtime import OnnxModel
from qat.export.verify import SiteDifference, Verification
from qat.gate import ONNX, PACKED, Evaluation
from qat.graph.convert import convert
from qat.training.evaluate import Score
from tests.helpers import folded, make_scheme


@pytest.fixture
def report():
    sites = [SiteDifference("relu", 0.0, 0), SiteDifference("layer.bn", 0.125, 3)]
    agreement = {"converted": 1.0, "onnxruntime": 0.5}
    return Report(
        name="demo",
        accuracy={"float": 91.25, "fake_quant": 90.5, "converted": 90.5, "onnxruntime": 45.25},
        verification=Verification(agreement, {"onnxruntime": 12.5}, sites, threshold=0.999),
        size_bytes={"float": 4000, "onnx": 1500, "safetensors": 1200},
        layers=[LayerRow("conv", 4, 1234, 0.25)],
        seconds={"float": 1.23456, "export": 2.0},
        float_share=0.0625,
        perplexity={"float": 1.75, "onnxruntime": 2.125},
        details={"seed": 7},
    )


def test_stable_keys(report, tmp_path):
    report.save(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["accuracy"]) == {"float", "fake_quant", "converted", "onnxruntime"}
    assert found["perplexity"] == {"float": 1.75, "onnxruntime": 2.125}
    assert found["agreement"]["onnxruntime"] == 0.5
    assert set(found["size_bytes"]) == {"float", "onnx", "safetensors"}
    assert found["seconds"] == {"float": 1.235, "export": 2.0}
    assert found["passed"] is False
    assert found["first_difference"] == "layer.bn"
    assert found["float_share"] == 0.0625
    assert found["layers"] == [{"layer": "conv", "bits": 4, "weights": 1234, "sparsity": 0.25}]


def test_the_failure_is_written_down_before_it_is_raised(report, tmp_path):
    report.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is False
    with pytest.raises(VerificationError, match=r"layer\.bn"):
        report.verification.check()


def test_markdown_has_the_numbers(report):
    text = report.to_markdown()
    for part in ("demo: FAILED", "99.90%", "| 90.50 |  |", "2.125", "`layer.bn`", "6.25%",
                 "91.25", "45.25", "50.0000%", "12.5", "1,500", "1.2", "1,234", "25.0%",
                 "1.25e-01", "| seed | 7 |"):  # fmt: skip
        assert part in text, part
    report.verification.agreement.clear()
    report.verification.sites.clear()
    assert "demo: passed" in report.to_markdown()
    assert "no site differs" in report.to_markdown()


def test_layer_rows_count_real_zeros():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
    model = nn.Sequential(first, nn.ReLU(), second)
    with torch.no_grad():
        # every channel has another range, so an affine grid has another zero point for each
        first.weight.copy_(
            torch.tensor([[0.0, 0, 0, 1], [0, 0, -1, 1], [0, 1, 2, 3], [-3, -2, 1, 1]])
        )
        second.weight.fill_(1.0)
    affine = {"symmetric": False, "narrow": False}
    captured, _ = folded(model, make_scheme(8, 8, weight=affine), torch.randn(8, 4))
    rows = layer_rows(convert(captured))
    assert rows == [LayerRow("0", 8, 16, 6 / 16), LayerRow("2", 8, 8, 0.0)]


def test_float_bytes():
    assert float_bytes(nn.Linear(3, 2)) == 4 * 8
    assert float_bytes(nn.BatchNorm1d(5)) == 4 * 20 + 8


def test_whole_artifact(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(96, 6), torch.randint(0, 4, (96,))
    captured, plan = folded(model, make_scheme(4, 8), x)
    batches = [(x[:64], y[:64]), (x[64:], y[64:])]
    evaluation = Evaluation(batches, threshold=1.1, samples=24)  # out of reach: the gate must close
    report = write_artifact(
        captured,
        plan,
        tmp_path,
        evaluation,
        Baseline({"float": Score(50.0, 2.5)}, 1000),
        description={"name": "tiny", "classes": list("abcd")},
        seconds={"float": 3.0},
    )
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["passed"] is False
    with pytest.raises(VerificationError, match=r"110\.00%"):
        report.verification.check()
    assert found["agreement"] == {
        "converted": 1.0,
        "onnxruntime": 1.0,
        "chip": 1.0,
        "simulated": 1.0,
        "onnxruntime_unoptimised": 1.0,
    }
    kinds = ["float", "fake_quant", "converted", "onnxruntime", "chip", "simulated"]
    kinds.append("onnxruntime_unoptimised")
    assert list(found["accuracy"]) == kinds
    assert list(found["perplexity"]) == kinds
    assert (found["accuracy"]["float"], found["perplexity"]["float"]) == (50.0, 2.5)
    line = report.accuracies
    assert line.startswith(f"float 50.00 %, fake_quant {found['accuracy']['fake_quant']:.2f} %, ")
    assert [part.endswith(" (of 20)") for part in line.split(", ")] == [
        k in kinds[4:] for k in kinds
    ]
    loss = nn.functional.cross_entropy(captured.eval()(x[::5]), y[::5])
    assert found["perplexity"]["simulated"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert found["predictions"] == {
        **dict.fromkeys(kinds[1:4], 96),
        **dict.fromkeys(kinds[4:], 20),  # of two batches of 64, each fifth
    }
    hits = (captured.eval()(x).argmax(1) == y).double().mean().item() * 100
    assert found["accuracy"]["fake_quant"] == pytest.approx(hits)
    assert list(found["seconds"]) == ["float", "convert", "export", "verify"]
    assert found["size_bytes"]["onnx"] == (tmp_path / ONNX).stat().st_size
    assert found["size_bytes"]["safetensors"] == (tmp_path / PACKED).stat().st_size
    assert OnnxModel(tmp_path / ONNX).metadata["classes"] == list("abcd")
    assert load_packed(tmp_path / PACKED)[1]["name"] == "tiny"
    assert {s["site"] for s in found["sites"]} == set(plan.activations)

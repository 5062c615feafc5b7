"""Real models: the share in float that a plan prints, the integer reference's and the file's."""

import importlib
from pathlib import Path

import pytest
import torch

from qat.export.onnx import export_onnx
from qat.graph.convert import convert
from scripts.zoo_products import NEAR
from tests.campaigns.transformer_models import NAMES, build
from tests.products import CountedRun, count_file, float_names, planned

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers and timm
NO_FILE = {"qwen3_moe"}  # what chooses experts has no form in ONNX
IMAGES = [
    "googlenet", "mobilenet_v3_small", "resnet18", "swin_t", "vit_b_32", "timm/coat_lite_tiny",
    "timm/convit_tiny", "timm/edgenext_xx_small", "timm/mvitv2_tiny", "timm/nf_resnet50",
    "timm/resnetv2_50", "timm/sebotnet33ts_256", "timm/sequencer2d_s", "timm/tf_efficientnetv2_b0",
    "timm/swinv2_tiny_window8_256", "timm/xcit_nano_12_p16_224",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_share_in_float_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    model, x = build(name)
    captured, share = compare(name, model, x)
    if name not in NO_FILE:
        export_onnx(convert(captured), x[:2], tmp_path / "model.onnx")
        total, in_float = count_file(tmp_path / "model.onnx", {"input": x.numpy()})
        print(f"{name}: file {in_float / total:.4%}")  # noqa: T201 (the figures of the campaign)
        assert abs(in_float / total - share) < NEAR


@pytest.mark.parametrize("name", IMAGES)
def test_the_share_in_float_of_the_zoo(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    zoo_models = importlib.import_module("zoo_models")
    torch.manual_seed(0)
    model, size = zoo_models.build(name)
    compare(name, model.eval(), zoo_models.pictures(2, size))


def compare(name, model, x):
    """Compare a plan with the integer reference; return the model and the plan's share."""
    captured, plan, names = planned(model, x)
    run = CountedRun(captured)
    total, in_float = run.count(x)
    print(f"{name}: plan {plan.float_share:.4%}, reference {in_float / total:.4%}")  # noqa: T201
    assert float_names(run, names) <= {f.name for f in plan.floats}
    assert abs(total / len(x) / plan.macs - 1) < NEAR
    assert abs(in_float / total - plan.float_share) < NEAR
    return captured, plan.float_share

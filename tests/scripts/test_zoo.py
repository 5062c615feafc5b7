"""A representative fifteen of the zoo: captured unchanged, and nearly all of them quantized."""

import json
from functools import partial

import pytest
import torch
from torch import nn

from qat.fake_quant import Phase, activation_quants
from qat.graph.insert import prepare
from qat.training.callbacks.calibrate import observe
from tests.helpers import make_scheme

FIFTEEN = {
    "alexnet": 0.99,
    "convnext_tiny": 0.99,
    "densenet121": 0.99,
    "efficientnet_b0": 0.99,
    "googlenet": 0.99,
    "inception_v3": 0.99,
    "mnasnet0_5": 0.99,
    "mobilenet_v3_small": 0.99,
    "regnet_y_400mf": 0.99,
    "resnet18": 0.99,
    "shufflenet_v2_x0_5": 0.99,
    "squeezenet1_1": 0.99,
    "swin_t": 0.97,
    "vgg11_bn": 0.99,
    "vit_b_32": 0.97,
}

LARGE = {
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "swin_t", "vgg11_bn", "vit_b_32",
}  # fmt: skip


class Shares(nn.Module):
    """Attention twice: by softmax, and by quotients."""

    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        scores = self.linear(x) @ x.mT
        positive = scores.sigmoid()
        y = scores.softmax(-1) @ x + (positive / positive.sum(-1, keepdim=True)) @ x
        return self.head(y)


@pytest.fixture
def zoo(load_script):
    return load_script("zoo")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in FIFTEEN]
)
def test_model_is_captured_unchanged(name, zoo):
    row = zoo.examine(name, "capture", samples=2)
    assert row.error == ""
    assert row.captured
    assert row.keys_equal
    assert row.leaves == 0
    assert row.eval_gap is not None
    assert row.train_gap is not None
    assert row.quantized_share is not None
    assert max(row.eval_gap, row.train_gap) <= 1e-5
    assert row.quantized_share >= FIFTEEN[name]


def test_a_difference_has_its_margin(zoo):
    expected = torch.tensor([[1.0, 0.75, 0.0], [0.0, 2.0, 0.5]])
    found = torch.tensor([[1.0, 1.25, 0.0], [0.0, 2.0, 0.5]])
    text = zoo.difference(expected, found)
    assert text.startswith(
        "1 of 2 predictions differ, where the two best classes are at most 0.25 "
    )
    assert "differ by up to 0.5," in text


def test_a_model_goes_all_the_way(tmp_path, capsys, zoo):
    page, found = tmp_path / "zoo.md", tmp_path / "zoo.json"
    page.write_text("# Zoo\n<!-- zoo -->\nold\n<!-- /zoo -->\nend\n")
    options = ["--models", "squeezenet1_1,nosuch", "--json", str(found), "--into", str(page)]
    assert zoo.main([*options, "--samples", "4"]) == 0
    good, bad = json.loads(found.read_text())
    assert (good["trained"], good["converted"], good["exported"]) == (True, True, True)
    assert good["agreement"] == 1.0
    assert 0 < good["calibration_error"] < 0.1
    assert not bad["captured"]
    assert "nosuch" in bad["error"]
    assert len(capsys.readouterr().out.splitlines()) == 2
    text = page.read_text()
    assert text.startswith("# Zoo\n")
    assert text.endswith("end\n")
    assert "old" not in text
    assert "2 models, 1 captured, 1 trained, 1 converted, 1 exported, 1 agree" in text


def test_names_of_groups(load_script):
    names = load_script("zoo_models").names
    assert len(names("timm")) == 60
    assert names("all") == [*names("torchvision"), *names("timm")]
    assert names("a,b") == ["a", "b"]


@pytest.mark.parametrize("head", [nn.Conv2d(24, 10, 1), nn.Linear(24, 10, bias=False)])
def test_a_fitted_head_tells_the_samples_apart(load_script, head):
    models = load_script("zoo_models")
    torch.manual_seed(0)
    pool, flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    tail = [head, pool, flat] if isinstance(head, nn.Conv2d) else [pool, flat, head]
    model = nn.Sequential(nn.Conv2d(3, 24, 5), nn.ReLU(), *tail)
    x = models.pictures(10, 16)
    models.decide(model, x)
    assert torch.equal(model(x).argmax(1), torch.arange(10))


@pytest.mark.parametrize(
    ("errors", "part"),
    [
        ((0.01, 0.0, 0.01), ""),
        ((0.02, 0.005, 0.02), "noise of the size of 8-bit rounding alone costs 0.005"),
        ((0.02, 0.0049, 0.02), "above the limit 0.01"),
        ((2.0, 0.001, 0.01), "attention is nearly even"),
        ((2.0, 0.005, 0.02), "0.02 with these in float"),
        ((2.0, 0.001, 0.011), "above the limit 0.01"),
    ],
)
def test_an_error_above_the_limit_has_its_reason(errors, part, load_script):
    script = load_script("zoo_errors")
    text = script.reason(script.Errors(*errors))
    assert part in text
    assert bool(text) == bool(part)


@pytest.mark.parametrize("factor", [1, 40])
def test_a_grid_that_fits_another_tensor_has_no_reason(factor, load_script, monkeypatch):
    script = load_script("zoo_errors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    captured, _ = prepare(model, make_scheme(), x := torch.randn(64, 8))

    def observe_wrongly(model, sites, batches):
        observe(model, sites, batches)
        for site in sites:
            site.quantizer.set_scale(site.quantizer.scale * factor)

    monkeypatch.setattr(script, "observe", observe_wrongly)
    text = script.reason(script.calibration_errors(captured, x))
    assert text == ("" if factor == 1 else "calibration_error is above the limit 0.01")


def test_what_attention_shares_out_is_found(load_script):
    script = load_script("zoo_errors")
    captured, _ = prepare(Shares(), make_scheme(), x := torch.randn(8, 5, 6))
    found = []
    script._outputs(captured, x, activation_quants(captured), partial(script._add_share, found))
    names = {site.site for site in found}
    assert names == {"softmax", "truediv"}
    phases = [site.phase for site in found]
    with script._in_float(found):
        assert {site.phase for site in found} == {Phase.FLOAT}
    assert [site.phase for site in found] == phases


@pytest.mark.parametrize("in_float", [0, 20, 21])
def test_a_plan_that_is_not_what_runs_is_told(in_float, zoo):
    row = zoo.Row("a", quantized_share=0.99)
    zoo.add_share(row, 2000, in_float)
    zoo.add_share(row, 2000, 20)
    assert row.share_gap == pytest.approx(abs(in_float - 20) / 2000)
    assert row.error == ("the plan has 1.00% in float, what runs 0.00%" if in_float == 0 else "")


def test_table_shows_what_was_not_reached_as_empty(zoo):
    assert "| a | yes |  | 0.5 |" in zoo.to_markdown([zoo.Row("a", captured=True, eval_gap=0.5)])

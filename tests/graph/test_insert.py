import copy
from typing import Any

import pytest
import torch
from torch import nn

from qat.batch_norm import StagedBatchNorm
from qat.fake_quant import FakeQuant, Phase, activation_quants, scale_parameters, weight_quants
from qat.graph.insert import CONTAINER, activation_key, prepare
from qat.layers import QuantizedLayer
from tests.helpers import calibrate, make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        x = self.relu(y)
        return self.fc(self.drop(x.mean((2, 3))))


@pytest.fixture
def block():
    return Block()


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
@pytest.mark.parametrize("training", [True, False])
def test_quantizers_that_are_off_change_nothing(block, x, batch_norm, training):
    captured, _ = prepare(block, make_scheme(batch_norm=batch_norm), x)
    outputs, gradients = [], []
    for model in (block, captured):
        model.train(training)
        torch.manual_seed(5)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*outputs)
    assert list(gradients[0]) == list(gradients[1])
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_every_site_of_the_plan_is_there(block, x):
    captured, plan = prepare(block, make_scheme(), x)
    assert {f.site for f in activation_quants(captured)} == set(plan.activations)
    assert {f.site for f in weight_quants(captured)} == {f"{n}.weight" for n in plan.weights}
    for name, site in plan.activations.items():
        quant = captured.get_submodule(f"{CONTAINER}.{activation_key(name)}")
        assert isinstance(quant, FakeQuant)
        assert quant.spec == site.format.spec
    for name, site in plan.weights.items():
        layer = captured.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        assert layer.weight_quant.spec == site.format.spec
        source = layer.links.input_quant
        assert source is not None
        assert source.site == site.source
        norm = layer.links.batch_norm
        assert norm is (captured.get_submodule(site.batch_norm) if site.batch_norm else None)
    assert isinstance(captured.bn1, StagedBatchNorm)


def test_both_modes_have_the_same_sites(block, x):
    captured, plan = prepare(block, make_scheme(), x)
    for graph in captured.graphs.values():
        targets = [str(n.target) for n in graph.nodes if str(n.target).startswith(CONTAINER)]
        assert sorted(targets) == sorted(
            f"{CONTAINER}.{activation_key(n)}" for n in plan.activations
        )


def test_everything_starts_in_float(block, x):
    captured, _ = prepare(block, make_scheme(), x)
    assert {m.phase for m in captured.modules() if isinstance(m, FakeQuant)} == {Phase.FLOAT}


def test_state_goes_round_strictly(block, x):
    scheme = make_scheme(4, 4, weight=LEARNED, activation=LEARNED)
    captured, _ = prepare(block, scheme, x)
    calibrate(captured, x)
    other, _ = prepare(Block(), scheme, x)
    other.load_state_dict(copy.deepcopy(captured.state_dict()), strict=True)
    other.eval()
    assert torch.equal(other(x), captured(x))
    assert not torch.equal(other(x), block.eval()(x))


def test_original_names_come_first_and_load_from_a_float_checkpoint(block, x):
    captured, _ = prepare(block, make_scheme(), x)
    ours = [k for k in captured.state_dict() if k in block.state_dict()]
    assert ours == list(block.state_dict())
    missing, unexpected = captured.load_state_dict(Block().state_dict(), strict=False)
    assert not unexpected
    assert all("quant" in k or k.startswith(CONTAINER) or "_extra_state" in k for k in missing)


def test_parameters_are_complete_before_the_first_step(block, x):
    scheme = make_scheme(weight=LEARNED, activation=LEARNED)
    captured, plan = prepare(block, scheme, x)
    before = dict(captured.named_parameters())
    scales = {id(p) for p in scale_parameters(captured)}
    assert len(scales) == len(plan.weights) + len(plan.activations)
    assert set(before) - {n for n, p in before.items() if id(p) in scales} == {
        n for n, _ in block.named_parameters()
    }
    calibrate(captured, x)
    captured.train()(x)
    after = dict(captured.named_parameters())
    assert {n: (id(p), p.shape) for n, p in after.items()} == {
        n: (id(p), p.shape) for n, p in before.items()
    }


def test_weights_are_trained_through_the_grid(block, x):
    captured, _ = prepare(block, make_scheme(4, 8, weight=LEARNED, activation=LEARNED), x)
    calibrate(captured, x)
    captured.train()(x).square().sum().backward()
    for name, parameter in captured.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.startswith("bn1"), name


def test_insertion_leaves_no_unused_site(block, x):
    captured, _ = prepare(block, make_scheme(), x)
    seen = set()
    for quant in activation_quants(captured):
        quant.register_forward_hook(lambda module, args, output: seen.add(module.site))
    captured.eval()(x)
    assert seen == {f.site for f in activation_quants(captured)}


def test_quantized_tensors_lie_on_their_grids(block, x):
    captured, _ = prepare(block, make_scheme(3, 3), x)
    calibrate(captured, x)
    values: dict[str, torch.Tensor] = {}

    def keep(quant: Any, args: Any, y: torch.Tensor) -> None:
        values[quant.site] = y / quant.quantizer.scale

    for quant in activation_quants(captured):
        quant.register_forward_hook(keep)
    captured(x)
    for site, steps in values.items():
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert len(steps.round().unique()) <= 8, site

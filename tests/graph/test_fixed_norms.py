"""Batch-norms that never follow batches: captured so, folded, and exact."""

import logging
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from qat.batch_norm import Stage
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.layers import fold
from qat.reference.run import IntegerRun
from qat.training.callbacks.reestimate import reestimate
from qat.training.phases import phase_of
from tests.helpers import calibrate, make_scheme


class Overridden(nn.Module):
    """The usual way: a body whose train() leaves its batch-norm, and a dropout, in evaluation."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout()

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        self.drop.eval()
        return self

    def forward(self, x):
        return self.drop(self.norm(x))


class AlwaysEval(nn.BatchNorm2d):
    def train(self, mode=True):
        del mode
        return super().train(False)


class Functional(nn.BatchNorm2d):
    def forward(self, input):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(input, *statistics, self.weight, self.bias, False, 0.1, self.eps)


class DetrFrozenBatchNorm2d(nn.Module):
    """Written as DETR has it, with an epsilon of its own."""

    def __init__(self, epsilon=1e-5):
        super().__init__()
        self.epsilon = epsilon
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(8))

    def forward(self, x):
        weight, bias, mean, variance = (b.reshape(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (variance + self.epsilon).rsqrt()
        return x * scale + (bias - mean * scale)


NORMS = {
    "overridden": Overridden,
    "always eval": lambda: AlwaysEval(8),
    "functional": lambda: Functional(8),
    "torchvision": lambda: FrozenBatchNorm2d(8),
    "detr": DetrFrozenBatchNorm2d,
}


class Root(nn.Sequential):
    """The model itself overrides train()."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def network(norm, kind=nn.Sequential):
    torch.manual_seed(0)
    for name, values in [*norm.named_buffers(), *norm.named_parameters()]:
        if values.is_floating_point():
            values.data.uniform_(0.5, 2.0) if "var" in name else values.data.normal_()
    head = nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3)
    return kind(nn.Conv2d(3, 8, 3, bias=False), norm, *head)


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k}


@pytest.mark.parametrize("kind", [*NORMS, "root"])
def test_they_stay_fold_and_are_exact(kind):
    model = network(nn.BatchNorm2d(8), Root) if kind == "root" else network(NORMS[kind]())
    x, names = torch.randn(16, 3, 5, 5), list(model.state_dict())
    captured, plan = prepare(model, make_scheme(8, 8), x[:2])
    assert plan.weights["0"].batch_norm is not None
    assert [name for name in captured.state_dict() if name in names] == names
    for mode in (True, False):
        torch.testing.assert_close(captured.train(mode)(x), model.train(mode)(x))
    assert torch.equal(deepcopy(captured).train()(x), captured.train()(x))
    assert phase_of(captured) == "float"

    before = statistics(captured)
    calibrate(captured, x)
    optimizer = torch.optim.SGD([p for p in captured.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        captured.train()(x).square().mean().backward()
        optimizer.step()
    assert reestimate(captured, [x]) == 0
    assert all(torch.equal(v, captured.state_dict()[k]) for k, v in before.items())
    assert phase_of(captured) == "quantize"

    fold(captured)
    assert captured.get_submodule(str(plan.weights["0"].batch_norm)).stage is Stage.FOLDED
    expected = IntegerRun(captured.eval())(x)
    assert torch.equal(IntegerRun(convert(captured))(x), expected)


@pytest.mark.parametrize("values", [{"momentum": 0.0}, {"affine": False}, {"momentum": None}])
def test_others_follow_batches_as_in_pytorch(values):
    model = network(nn.BatchNorm2d(8, **values))
    captured, plan = prepare(model, make_scheme(8, 8), torch.randn(2, 3, 5, 5))
    assert plan.weights["0"].batch_norm == "1"
    x = torch.randn(16, 3, 5, 5)
    torch.testing.assert_close(captured.train()(x), model.train()(x))
    theirs = statistics(model)
    assert all(torch.equal(v, theirs[k]) for k, v in statistics(captured).items())


def test_a_class_of_such_a_name_that_computes_something_else_is_left_as_it_is():
    other = DetrFrozenBatchNorm2d(epsilon=0.5)
    model = network(other)
    captured, plan = prepare(model, make_scheme(8, 8), torch.randn(2, 3, 5, 5))
    assert plan.weights["0"].batch_norm is None
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(captured(x), model(x))


def test_eval_from_outside_is_undone_by_train_and_that_is_said(caplog):
    model = network(nn.BatchNorm2d(8)).train()
    model[1].eval()
    with caplog.at_level(logging.WARNING, logger="qat"):
        captured, _ = prepare(model, make_scheme(8, 8), torch.randn(2, 3, 5, 5))
    assert "1 batch-norms are in eval mode" in caplog.text
    assert "first '1'" in caplog.text
    before, x = statistics(captured), torch.randn(16, 3, 5, 5)
    captured.train()
    captured.get_submodule("1").eval()  # as one would in any loop
    captured(x)
    assert all(torch.equal(v, captured.state_dict()[k]) for k, v in before.items())
    captured.train()(x)
    assert not any(torch.equal(v, captured.state_dict()[k]) for k, v in before.items())

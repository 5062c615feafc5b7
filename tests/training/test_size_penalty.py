"""Size penalty: what a bit costs, and whose bits count."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from qat.errors import ConfigError
from qat.fake_quant import Phase, weight_quants
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.spec import Rule
from qat.training.callbacks import SizePenalty
from qat.training.callbacks.size_penalty import mean_bits
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import calibrate, make_scheme


@pytest.fixture
def captured():
    """Two layers that learn their bits, of 48 and 24 weights, and one that does not."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 5))
    rules = {"last": Rule("3", weight={"quantizer": "lsq"})}
    scheme = make_scheme(4, 8, weight={"quantizer": "learned_bits"}, rules=rules)
    x = torch.randn(4, 6)
    captured = prepare(model, scheme, x)[0]
    calibrate(captured, x)
    return captured


def limit(captured, layer, top):
    quantizer = captured.get_submodule(layer).weight_quant.quantizer
    with torch.no_grad():
        quantizer.learned_limit.copy_(quantizer.learned_scale * top)


def test_mean_is_over_weights_that_learn_their_bits(captured):
    assert mean_bits(captured) == 4
    limit(captured, "0", 3)
    limit(captured, "2", 1)
    assert mean_bits(captured) == (48 * 3 + 24 * 2) / 72
    mean_bits(captured).backward()
    assert captured.get_submodule("0").weight_quant.quantizer.learned_limit.grad.all()
    assert captured.get_submodule("3").weight_quant.quantizer.learned_scale.grad is None


def test_one_weight_has_the_bits_that_it_has():
    x = torch.randn(4, 1)
    scheme = make_scheme(4, 8, weight={"quantizer": "learned_bits", "axis": None})
    captured = prepare(nn.Sequential(nn.Linear(1, 1)), scheme, x)[0]
    calibrate(captured, x)
    assert mean_bits(captured) == 4


@pytest.mark.parametrize("phase", [Phase.FLOAT, Phase.OBSERVE, Phase.FROZEN])
def test_bits_cost_only_while_they_move(captured, phase):
    for quant in weight_quants(captured):
        quant.set_phase(phase)
    assert mean_bits(captured) == 0


def test_task_adds_the_penalty_to_the_loss(captured):
    task = QATTask(captured, Plan("test"), Schedule(), Rates(), lambda groups: None)
    task.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    task.log = lambda *args, **options: None
    batch = torch.randn(4, 6), torch.tensor([0, 1, 2, 4])
    without = task.training_step(batch, 0).item()
    for _ in range(2):  # a second fit must not count twice
        SizePenalty(0.25).on_fit_start(task.trainer, task)
    assert task.training_step(batch, 0).item() == pytest.approx(without + 0.25 * 4)


def test_negative_weight_is_refused():
    with pytest.raises(ConfigError, match=r"size_penalty\.weight .* at least 0, got -1"):
        SizePenalty(-1)

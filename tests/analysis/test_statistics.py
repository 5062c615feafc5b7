from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from qat.analysis.statistics import measure_divergence, normal_divergence
from qat.batch_norm import freeze_batch_norm, stage_batch_norm
from qat.layers import fold
from tests.helpers import calibrate
from tests.training.small import Data, make_task


def test_divergence_is_that_of_the_distributions():
    mean, of_mean = torch.randn(5), torch.randn(5)
    deviation, of_deviation = torch.rand(5) + 0.5, torch.rand(5) + 0.5
    expected = kl_divergence(Normal(mean, deviation), Normal(of_mean, of_deviation))
    ours = normal_divergence(mean, deviation**2, of_mean, of_deviation**2)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(normal_divergence(mean, deviation, mean, deviation), torch.zeros(5))


def test_a_batch_norm_that_knows_its_batch_has_none():
    norm: Any = nn.BatchNorm2d(3, momentum=1.0)
    stage_batch_norm(norm)
    model, x = nn.Sequential(norm), torch.randn(4, 3, 5, 5) * 2 + 1
    model.train()(x)
    model.eval()
    assert measure_divergence(model, x)["0"] == pytest.approx(0.0, abs=1e-6)
    y = x * 3 - 5
    var, mean = y.movedim(1, 0).flatten(1).var(1), y.mean((0, 2, 3))
    used = Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    true = Normal(mean, (var + norm.eps).sqrt())
    assert measure_divergence(model, y)["0"] == pytest.approx(
        kl_divergence(true, used).mean().item(), rel=1e-4
    )


def test_only_batch_norms_in_use_are_measured_and_nothing_stays():
    task, x = make_task(), Data().x
    calibrate(task.model, x)  # pyright: ignore[reportArgumentType]
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    assert set(measure_divergence(task.model, x)) == {"1"}
    freeze_batch_norm(task.model)
    assert set(measure_divergence(task.model, x)) == {"1"}
    assert not any(m._forward_pre_hooks for m in task.model.modules())
    assert all(
        torch.equal(v, task.model.state_dict()[k])
        for k, v in before.items()
        if not k.endswith("_extra_state")
    )
    fold(task.model)
    assert measure_divergence(task.model, x) == {}

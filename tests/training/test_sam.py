from functools import partial

import pytest
import torch
from torch import nn

from qat.assemble import make
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.training.callbacks import Calibrate, FreezeObservers
from qat.training.sam import SAM
from tests.training.small import Save, fit, make_task, same

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def test_three_steps_are_those_of_the_algorithm():
    a, b = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    sam = SAM([{"params": [a]}, {"params": [b]}], SGD, rho=0.5)

    def loss_of(x, y):
        return (x**2).sum() * y + y**4

    def closure():
        sam.zero_grad()
        loss = loss_of(a, b)
        loss.backward()
        return loss

    w = torch.tensor([1.0, -2.0, 3.0])
    speed = torch.zeros(3)
    for _ in range(3):
        at = w.clone().requires_grad_()
        value = loss_of(at[:2], at[2])
        (gradient,) = torch.autograd.grad(value, at)
        there = (w + 0.5 * gradient / gradient.norm()).requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(there[:2], there[2]), there)
        speed = 0.9 * speed + gradient
        w = w - 0.1 * speed
        assert sam.step(closure).item() == pytest.approx(value.item())
        # the norm of the whole gradient is taken in another order
        torch.testing.assert_close(torch.cat([a, b[None]]).detach(), w)
    assert sam.state is sam.base.state
    assert sam.state[a]["momentum_buffer"].shape == (2,)


def test_scales_do_not_climb_and_still_step():
    w, s = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    seen = []
    groups = [{"name": "weights", "params": [w]}, {"name": "scales", "params": [s], "lr": 0.01}]
    sam = SAM(groups, SGD, rho=0.5)

    def closure():
        sam.zero_grad()
        seen.append((w.item(), s.item()))
        (w * s).backward()

    sam.step(closure)
    assert seen == [(2.0, 3.0), (2.5, 3.0)]
    assert s.item() == pytest.approx(3.0 - 0.01 * 2.5)
    assert w.item() == pytest.approx(2.0 - 0.1 * 3.0)


def test_it_trains_and_resumes_bit_for_bit(tmp_path):
    factory = partial(SAM, base=SGD, rho=0.05)
    whole, resumed, plain = (make_task(optimizer=o) for o in (factory, factory, SGD))
    fit(plain, Calibrate(2), FreezeObservers())
    fit(whole, Calibrate(2), FreezeObservers(), Save(tmp_path / "cut.ckpt"))
    fit(resumed, Calibrate(2), FreezeObservers(), resume=tmp_path / "cut.ckpt")
    assert same(whole.model, resumed.model)
    assert not same(whole.model, plain.model)


def test_the_group_builds_it_with_the_rates_of_sgd():
    config = compose_plain(["recipe=resnet_w4a4", "optimizer=sam", "optimizer.factory.rho=0.1"])
    sam = make(config["optimizer"]["factory"])([{"params": [nn.Parameter(torch.ones(2))]}])
    assert isinstance(sam, SAM)
    assert sam.rho == 0.1
    assert isinstance(sam.base, torch.optim.SGD)
    assert sam.base.defaults["nesterov"]
    assert config["optimizer"]["rates"]["qat_lr"] == 0.02


def test_accumulated_gradients_are_refused():
    task = make_task(optimizer=partial(SAM, base=SGD))
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=1 .* got 2"):
        fit(task, Calibrate(2), accumulate_grad_batches=2)


def test_without_a_closure():
    sam = SAM([{"params": [nn.Parameter(torch.ones(2))]}], SGD)
    with pytest.raises(ConfigError, match=r"closure .* trainer\.precision"):
        sam.step()


def test_values_that_make_no_sense():
    with pytest.raises(ConfigError, match=r"factory\.rho .* above 0, got 0"):
        SAM([{"params": [nn.Parameter(torch.ones(2))]}], SGD, rho=0)

"""Staged batch-norms: what each stage computes, and one batch over two processes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qat import batch_norm as module
from qat.batch_norm import (
    Stage,
    StagedBatchNorm,
    batch_norms,
    channel_gain,
    channel_shift,
    freeze_batch_norm,
    norm_in_use,
    restore_batch_norm,
    stage_batch_norm,
)


def make(*, affine=True, eps=1e-3, momentum: float | None = 0.1):
    norm = nn.BatchNorm2d(3, eps=eps, momentum=momentum, affine=affine)
    norm.running_mean = torch.tensor([1.0, -2.0, 0.5])
    norm.running_var = torch.tensor([0.3, 2.0, 1e-4])
    if affine:
        norm.weight.data = torch.tensor([1.5, -0.5, 0.0])
        norm.bias.data = torch.tensor([0.1, 0.2, -0.3])
    return norm


def staged(norm, stage):
    norm = copy.deepcopy(norm)
    stage_batch_norm(norm)
    norm.stage = stage
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine", [True, False])
def test_live_is_the_original(affine, training):
    norm, x = make(affine=affine).train(training), torch.randn(4, 3, 5, 5)
    twin = staged(norm, Stage.LIVE)
    assert torch.equal(twin(x), norm(x))
    for key, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_is_evaluation_in_training_mode_and_leaves_statistics_alone(affine):
    norm, x = make(affine=affine), torch.randn(4, 3, 5, 5, requires_grad=True)
    twin = staged(norm, Stage.FROZEN).train()
    result = twin(x)
    assert torch.equal(result, norm.eval()(x))
    for key, value in norm.state_dict().items():
        assert torch.equal(twin.state_dict()[key], value), key
    result.sum().backward()
    # Statistics are constants: each element's gradient is its channel's gain, to one rounding.
    gain = channel_gain(norm).detach().view(1, 3, 1, 1).expand_as(x)
    torch.testing.assert_close(x.grad, gain, rtol=1e-6, atol=0)
    if affine:
        assert torch.equal(twin.bias.grad, torch.full((3,), 100.0))


def test_folded_lets_everything_pass():
    x = torch.randn(4, 3, 5, 5)
    assert staged(make(), Stage.FOLDED)(x) is x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_is_one_multiplication_and_one_addition(affine, dtype):
    norm = staged(make(affine=affine), Stage.AFFINE).train()
    x, gain, shift = torch.randn(4, 3, 5, 5), channel_gain(norm), channel_shift(norm)
    expected = x.to(dtype) * gain.view(3, 1, 1) + shift.view(3, 1, 1)
    assert torch.equal(norm(x.to(dtype)), expected.to(dtype))
    plain = make(affine=affine).eval()(x)
    torch.testing.assert_close(norm(x), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_channel_gain_uses_the_modules_own_numbers(affine, eps):
    norm = make(affine=affine, eps=eps)
    gamma = [1.5, -0.5, 0.0] if affine else [1.0, 1.0, 1.0]
    expected = [g / (v + eps) ** 0.5 for g, v in zip(gamma, [0.3, 2.0, 1e-4], strict=True)]
    torch.testing.assert_close(channel_gain(norm), torch.tensor(expected), rtol=1e-6, atol=0)


def test_freezing_does_not_unfold():
    stages = [Stage.LIVE, Stage.FROZEN, Stage.FOLDED, Stage.AFFINE]
    model = nn.Sequential(*(staged(make(), stage) for stage in stages), make())
    freeze_batch_norm(model)
    assert [norm.stage for norm in batch_norms(model)] == [Stage.FROZEN, *stages[1:]]


def test_stage_is_saved_and_copied():
    norm, fresh = staged(make(), Stage.FROZEN), staged(make(), Stage.LIVE)
    fresh.load_state_dict(norm.state_dict(), strict=True)
    assert fresh.stage is Stage.FROZEN
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm)
        assert twin.stage is Stage.FROZEN


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("synchronised", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_what_a_fused_kernel_may_do_in_place_of_each_stage(
    monkeypatch, training, synchronised, ranks
):
    """``live`` follows the batch of this process; what must see others' is left to the module."""
    monkeypatch.setattr(module, "live_norm", lambda c, *rest: ("live", rest[-1].share))
    monkeypatch.setattr(module, "frozen_norm", lambda c, *rest: ("frozen", rest[-1].share))
    monkeypatch.setattr(module, "_num_ranks", lambda: ranks)
    norm = make(momentum=0.25)
    stage_batch_norm(norm.train(training), synchronised=synchronised)
    found = {}
    for stage in Stage:
        norm.stage = stage
        found[stage] = norm_in_use(norm, torch.randn(2, 3, 4, 4))
    live = None if synchronised and ranks > 1 else ("live", 0.25)
    assert found == {
        Stage.LIVE: live if training else ("frozen", 0.0),
        Stage.FROZEN: ("frozen", 0.0),
        Stage.FOLDED: None,
        Stage.AFFINE: None,
    }
    assert norm.num_batches_tracked == (1 if training and live else 0)
    norm.stage, norm.track_running_stats = Stage.FROZEN, False
    assert norm_in_use(norm, torch.randn(2, 3, 4, 4)) is None


def test_a_norm_that_never_follows_batches_starts_frozen():
    stages = []
    for fixed in (False, True):
        norm = make()
        stage_batch_norm(norm, fixed=fixed)
        stages.append(norm.stage)
    assert stages == [Stage.LIVE, Stage.FROZEN]


def test_restore_gives_the_class_and_the_keys_back():
    norm = staged(make(), Stage.FROZEN)
    assert isinstance(norm, StagedBatchNorm)
    restore_batch_norm(norm)
    assert type(norm) is nn.BatchNorm2d
    assert norm.state_dict().keys() == make().state_dict().keys()
    assert norm.__dict__.keys() == make().__dict__.keys()


TRAIN = """
def train(norm, batches, targets):
    outputs, grads = [], []
    for x, target in zip(batches, targets):
        x = x.clone().requires_grad_()
        y = norm(x)
        (y * target).sum().backward()
        outputs.append(y.detach())
        grads.append(x.grad)
    result = {"y": torch.cat(outputs), "x": torch.cat(grads)}
    result.update(weight=norm.weight.grad, bias=norm.bias.grad)
    result.update(norm.named_buffers())
    return result
"""


@pytest.mark.parametrize(
    ("kind", "shape", "momentum"),
    [("BatchNorm1d", (8, 3), 0.1), ("BatchNorm2d", (8, 3, 4, 4), None)],
)
def test_two_ranks_compute_as_one_with_the_whole_batch(two_ranks, kind, shape, momentum):
    data = f"""
torch.manual_seed(3)
norm = torch.nn.{kind}(3, eps=1e-3, momentum={momentum})
norm.weight.data, norm.bias.data = torch.randn(3), torch.randn(3)
batches, targets = torch.randn(2, *{shape}) * 3 + 1, torch.randn(2, *{shape})
"""
    alone = {"torch": torch}
    exec(TRAIN + data + "whole = train(norm, batches, targets)", alone)
    share = """
from qat.batch_norm import stage_batch_norm
stage_batch_norm(norm, synchronised=True)
torch.save(train(norm, batches[:, rank::2], targets[:, rank::2]), out)
"""
    parts = two_ranks(TRAIN + data + share)
    for key, expected in alone["whole"].items():
        pair = [part[key] for part in parts]
        if key in ("y", "x"):  # rank r took samples r, r + 2, ...
            result = torch.stack(pair, dim=1).flatten(0, 1)
        elif key in ("weight", "bias"):
            result = pair[0] + pair[1]
        else:
            assert torch.equal(*pair), key
            result = pair[0]
        assert (result - expected).abs().max() <= 1e-6 * expected.abs().max(), key

"""Fake-quants: what each phase does to tensors, ranges and saved state."""

import io
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from qat.errors import CalibrationError, SpecError
from qat.fake_quant import (
    Phase,
    activation_quants,
    fake_quants,
    make_fake_quant,
    scale_parameters,
    weight_quants,
)
from qat.observers import OBSERVERS
from qat.quantizers import QUANTIZERS
from qat.spec import QuantSpec

SPECS = {
    "apot": QuantSpec(4),
    "binary": QuantSpec(1),
    "dynamic_tensor": QuantSpec(8, signed=False, symmetric=False),
    "ir_net": QuantSpec(1),
    "n2uq": QuantSpec(4, signed=False),
    "power_of_two": QuantSpec(4),
    "ternary": QuantSpec(2),
    "ternary_learned": QuantSpec(2),
    **dict.fromkeys(("fp4", "mx", "nvfp4"), QuantSpec(4)),
}
"""Of quantizers that do not have 8 bits with a sign."""
WEIGHTS = ("dorefa", "ternary", "ternary_learned")
"""Quantizers of weights alone."""
FOLLOWED = dict.fromkeys(WEIGHTS[1:], ("cutoff", "observed_scale"))
"""What follows each weight, whatever the observer does."""
FOLLOWING = ("min_max", "moving_average")


def make(quantizer="uniform", observer="min_max", *, has_batch=None, spec=None):
    return make_fake_quant(
        "block.relu",
        spec or SPECS.get(quantizer, QuantSpec(8)),
        (4, 10),
        quantizer=quantizer,
        observer=observer,
        has_batch=quantizer not in WEIGHTS if has_batch is None else has_batch,
    )


def calibrated(*batches, **options):
    fake_quant = make(**options)
    fake_quant.set_phase(Phase.OBSERVE)
    for batch in batches or (torch.linspace(-1, 1, 40).view(4, 10),):
        fake_quant(batch)
    fake_quant.finish_calibration()
    return fake_quant


@pytest.mark.parametrize(("quantizer", "observer"), [*product(QUANTIZERS, OBSERVERS)])
def test_phase_decides_what_is_snapped_seen_and_moved(quantizer, observer):
    calibrated_once = calibrated(quantizer=quantizer, observer=observer)
    for phase, training in product(Phase, (True, False)):
        check_phase(deepcopy(calibrated_once), quantizer, observer, phase, training)


def check_phase(fake_quant, quantizer, observer, phase, training):
    fake_quant.train(training)
    fake_quant.set_phase(phase)
    state = {key: value.clone() for key, value in fake_quant.state_dict().items()}
    x = torch.randn(4, 10) * 50
    result = fake_quant(x)
    if phase in (Phase.FLOAT, Phase.OBSERVE):
        assert result is x
    else:
        assert torch.equal(result, fake_quant.quantizer(x))
        assert not torch.equal(result, x)
    moves = not QUANTIZERS[quantizer].is_dynamic and not fake_quant.quantizer.learns
    follows = phase is Phase.QUANTIZE and moves and observer in FOLLOWING
    sees = training and (phase is Phase.OBSERVE or follows)
    moved = {k for k, v in fake_quant.state_dict().items() if not torch.equal(v, state[k])}
    expected = {"observer.low", "observer.high"} if sees else set()
    if sees and phase is Phase.QUANTIZE:
        expected |= {"quantizer.observed_scale"}
    if sees or (training and phase is Phase.QUANTIZE):
        expected |= {f"quantizer.{key}" for key in FOLLOWED.get(quantizer, ())}
    assert moved == expected


def test_scale_follows_the_observed_range_while_quantizing():
    fake_quant = calibrated(torch.full((4, 10), 127.0))
    fake_quant.set_phase(Phase.QUANTIZE)
    assert fake_quant.quantizer.scale == 1
    x = torch.full((4, 10), 254.0)
    assert torch.equal(fake_quant(x), x)
    assert fake_quant.quantizer.scale == 2
    fake_quant(x / 8)
    assert fake_quant.quantizer.scale == 2  # an activation's range covers all batches


@pytest.mark.parametrize("observer", FOLLOWING)
def test_range_of_a_weight_is_that_of_the_weight_as_it_is_now(observer):
    fake_quant = calibrated(torch.full((4, 10), 127.0), observer=observer, has_batch=False)
    fake_quant.set_phase(Phase.QUANTIZE)
    for top in (254.0, 127.0, 31.75):
        fake_quant(torch.full((4, 10), top))
        assert fake_quant.quantizer.scale == top / 127


def test_calibration_sets_the_range_of_all_batches():
    fake_quant = calibrated(torch.full((4, 10), -128.0), torch.full((4, 10), 3.0))
    assert fake_quant.quantizer.scale == 1
    assert fake_quant.phase is Phase.OBSERVE


def test_new_calibration_starts_afresh():
    fake_quant = calibrated(torch.full((4, 10), 1270.0))
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(torch.full((4, 10), 127.0))
    fake_quant.finish_calibration()
    assert fake_quant.quantizer.scale == 1


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_phase_and_calibration_are_saved(quantizer, phase):
    fake_quant = calibrated(quantizer=quantizer)
    fake_quant.set_phase(phase)
    file = io.BytesIO()
    torch.save(fake_quant.state_dict(), file)
    file.seek(0)
    fresh = make(quantizer=quantizer)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert fresh.phase is phase
    assert fresh.calibrated
    x = torch.randn(4, 10)
    assert torch.equal(fresh.eval()(x), fake_quant.eval()(x))
    fresh.load_state_dict(make(quantizer=quantizer).state_dict(), strict=True)
    assert fresh.phase is Phase.FLOAT
    assert not fresh.calibrated


@pytest.mark.parametrize("phase", [Phase.QUANTIZE, Phase.FROZEN])
def test_quantizing_needs_calibration(phase):
    fake_quant = make()
    with pytest.raises(CalibrationError, match=r"'block\.relu' to be calibrated before"):
        fake_quant.set_phase(phase)
    assert fake_quant.phase is Phase.FLOAT


@pytest.mark.parametrize("observer", OBSERVERS)
def test_site_that_saw_nothing_is_an_error(observer):
    fake_quant = make(observer=observer).eval()
    fake_quant.set_phase(Phase.OBSERVE)
    fake_quant(torch.randn(4, 10))  # evaluation mode does not count
    with pytest.raises(CalibrationError, match=r"'block\.relu', got none"):
        fake_quant.finish_calibration()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_site_that_saw_no_finite_range_is_an_error(observer, value):
    fake_quant = make(observer=observer)
    fake_quant.set_phase(Phase.OBSERVE)
    x = torch.randn(4, 10)
    fake_quant(x)
    x[1, 2] = value
    fake_quant(x)
    with pytest.raises(CalibrationError, match=r"finite values at site 'block\.relu'"):
        fake_quant.finish_calibration()
    assert not fake_quant.calibrated


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"quantizer": "lsqq"}, r"\['apot', .*'uniform'\] at site 'block\.relu', got 'lsqq'"),
        ({"observer": "max"}, r"\['entropy', .*'unit_range'\] at site 'block\.relu', got 'max'"),
    ],
)
def test_unknown_part_is_an_error(parts, message):
    with pytest.raises(SpecError, match=message):
        make(**parts)


def test_learned_scale_gets_a_gradient_exactly_while_it_quantizes():
    fake_quant = calibrated(quantizer="lsq")
    (scale,) = fake_quant.quantizer.parameters()
    for phase in (*Phase, *Phase):  # FROZEN and back
        fake_quant.set_phase(phase)
        scale.grad = None
        x = torch.randn(4, 10, requires_grad=True)
        (fake_quant(x).square().sum() + x.sum()).backward()
        assert (scale.grad is not None) is (phase is Phase.QUANTIZE)
        assert scale.requires_grad is (phase is not Phase.FROZEN)


LEARNED = [name for name in QUANTIZERS if [*make(name).quantizer.parameters()]]
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.1, foreach=True),
    "fused": partial(torch.optim.Adam, lr=0.1, weight_decay=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("quantizer", LEARNED)
def test_frozen_stays_in_any_loop_with_any_optimizer(quantizer, optimizer):
    fake_quant = calibrated(quantizer=quantizer)
    x = nn.Parameter(torch.linspace(-1, 2, 40).view(4, 10))
    steps = OPTIMIZERS[optimizer]([x, *fake_quant.quantizer.parameters()])

    def moved(keep_gradients=False):
        before = {k: v.clone() for k, v in fake_quant.quantizer.state_dict().items()}
        for _ in range(2):
            steps.zero_grad(set_to_none=not keep_gradients)
            (fake_quant(x).square().sum() + x.sum()).backward()
            steps.step()
        state = fake_quant.quantizer.state_dict()
        return {k for k, v in before.items() if not torch.equal(v, state[k])}

    fake_quant.set_phase(Phase.QUANTIZE)
    learned = moved()  # momentum from here on
    assert learned
    start = x.detach().clone()
    fake_quant.set_phase(Phase.FROZEN)
    assert not moved(keep_gradients=True)
    fake_quant.requires_grad_(True)  # a loop that lets all layers of a model learn
    assert not moved()
    assert not torch.equal(x, start)
    fake_quant.load_state_dict(fake_quant.state_dict())
    assert not moved()
    fake_quant.set_phase(Phase.QUANTIZE)
    assert moved() == learned


def test_finders_list_each_once_in_order():
    weight = make("lsq", has_batch=False, spec=QuantSpec(8, axis=0))
    shared, other = make("lsq"), make("uniform")
    model = nn.Sequential(weight, shared, nn.ReLU(), shared, nn.Sequential(other))
    assert list(fake_quants(model)) == [weight, shared, other]
    assert weight_quants(model) == [weight]
    assert activation_quants(model) == [shared, other]
    scales = scale_parameters(model)
    assert [tuple(scale.shape) for scale in scales] == [(4, 1), ()]
    assert all(a is b for a, b in zip(scales, model.parameters(), strict=True))


def test_print_shows_site_phase_and_format():
    text = repr(make())
    assert "block.relu, FLOAT" in text
    assert "Uniform(i8)" in text

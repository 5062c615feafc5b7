"""What calibration costs a network with random weights, and whether its weights explain it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat.fake_quant import FakeQuant, Phase, activation_quants, weight_quants
from qat.training.callbacks.calibrate import observe
from qat.training.evaluate import first_output

LIMIT = 0.01
"""Largest error after calibration that needs no reason."""
FACTOR = 4.0
"""How often the error of noise an error may be: weights are rounded, too."""


class Errors(NamedTuple):
    """Mean squared errors of the outputs against the float model's, over their variance.

    Attributes:
        calibrated: After calibration.
        noise: Of the float model with noise in place of rounding, at every activation.
        softmax_in_float: After calibration, but for what softmax makes.
    """

    calibrated: float
    noise: float
    softmax_in_float: float


def calibration_errors(model: Any, x: Tensor) -> Errors:
    """Calibrate a prepared model on ``x``, in place, and return what that costs there."""
    expected = _outputs(model, x)

    def error() -> float:
        return ((_outputs(model, x) - expected).square().mean() / expected.var()).item()

    sites = activation_quants(model)
    hooks = [site.register_forward_hook(_add_noise) for site in sites]
    noise = error()
    for hook in hooks:
        hook.remove()
    observe(model, weight_quants(model), [x])
    observe(model, sites, [x])
    calibrated = error()
    shares = [site for site in sites if site.site.rpartition(".")[2].startswith("softmax")]
    return Errors(calibrated, noise, _without(shares, error) if shares else calibrated)


def reason(errors: Errors) -> str:
    """Return why an error is above the limit, as measured, or that it is not known why."""
    if errors.calibrated <= LIMIT:
        return ""
    limit = max(LIMIT, FACTOR * errors.noise)
    if errors.calibrated <= limit:
        return f"random weights: noise of the size of 8-bit rounding alone costs {errors.noise:.2g}"
    if errors.softmax_in_float <= limit:
        return (
            "random weights: attention is nearly even, and 8 bits are too few for its shares: "
            f"{errors.softmax_in_float:.2g} with these in float"
        )
    return f"calibration_error is above the limit {LIMIT}"


def _outputs(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return first_output(model.eval()(x)).double()


def _add_noise(site: Any, args: Any, values: Tensor) -> Tensor:
    """Return values with noise, even over a step of the 8-bit grid of just these values."""
    del site, args
    step = (values.amax().clamp_min(0) - values.amin().clamp_max(0)) / 255
    return values + (torch.rand_like(values) - 0.5) * step


def _without(sites: list[FakeQuant], error: Any) -> float:
    phases = [site.phase for site in sites]
    for site in sites:
        site.set_phase(Phase.FLOAT)
    found = error()
    for site, phase in zip(sites, phases, strict=True):
        site.set_phase(phase)
    return found

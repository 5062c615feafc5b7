"""What calibration costs a network with random weights, and whether its weights explain it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
        shares_in_float: After calibration, but for sites whose values are shares of 1.
    """

    calibrated: float
    noise: float
    shares_in_float: float


def calibration_errors(model: Any, x: Tensor) -> Errors:
    """Calibrate a prepared model on ``x``, in place, and return what that costs there."""
    sites, shares = activation_quants(model), list[FakeQuant]()
    expected = _outputs(model, x, sites, partial(_add_share, shares))

    def error(outputs: Tensor) -> float:
        return ((outputs - expected).square().mean() / expected.var()).item()

    noise = error(_outputs(model, x, sites, _add_noise))
    observe(model, weight_quants(model), [x])
    observe(model, sites, [x])
    calibrated = _outputs(model, x)
    with _in_float(shares):
        return Errors(error(calibrated), noise, error(_outputs(model, x)))


def reason(errors: Errors) -> str:
    """Return why an error is above the limit, as measured, or that it is not known why."""
    if errors.calibrated <= LIMIT:
        return ""
    limit = max(LIMIT, FACTOR * errors.noise)
    if errors.calibrated <= limit:
        return f"random weights: noise of the size of 8-bit rounding alone costs {errors.noise:.2g}"
    if errors.shares_in_float <= limit:
        return (
            "random weights: attention is nearly even, and 8 bits are too few for its shares: "
            f"{errors.shares_in_float:.2g} with these in float"
        )
    return f"calibration_error is above the limit {LIMIT}"


def _outputs(model: Any, x: Tensor, sites: Sequence[FakeQuant] = (), hook: Any = None) -> Tensor:
    hooks = [site.register_forward_hook(hook) for site in sites]
    with torch.no_grad():
        found = first_output(model.eval()(x)).double()
    for handle in hooks:
        handle.remove()
    return found


def _add_share(found: list[FakeQuant], site: Any, args: Any, values: Tensor) -> None:
    """Add a site to ``found`` if its values are shares of 1, as those of attention."""
    del args
    if values.ndim > 1 and values.shape[-1] > 1:
        sums = values.clamp_min(0).sum(-1)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
            found.append(site)


def _add_noise(site: Any, args: Any, values: Tensor) -> Tensor:
    """Return values with noise, even over a step of the 8-bit grid of just these values."""
    del site, args
    step = (values.amax().clamp_min(0) - values.amin().clamp_max(0)) / 255
    return values + (torch.rand_like(values) - 0.5) * step


@contextmanager
def _in_float(sites: Sequence[FakeQuant]) -> Iterator[None]:
    phases = [site.phase for site in sites]
    for site in sites:
        site.set_phase(Phase.FLOAT)
    yield
    for site, phase in zip(sites, phases, strict=True):
        site.set_phase(phase)

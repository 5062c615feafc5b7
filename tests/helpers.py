"""What several tests need to bring a small model from float to integers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.fake_quant import activation_quants, weight_quants
from qat.functional import kept
from qat.functional.fused import fused_kernels
from qat.graph.captured import Captured
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.layers import fold
from qat.spec import BatchNormMode, Rule, Scheme
from qat.training.callbacks.calibrate import observe

CPU = Path("/proc/cpuinfo")
HAS_VNNI = not CPU.exists() or "vnni" in CPU.read_text()
"""Whether products of uint8 and int8 are added up exactly everywhere; unknown counts as yes."""
WEIGHT = {"bits": 8, "axis": 0, "narrow": True, "quantizer": "uniform", "observer": "min_max"}
ACTIVATION = {"bits": 8, "quantizer": "uniform", "observer": "min_max"}


def make_scheme(
    weight_bits: int = 8,
    activation_bits: int = 8,
    *,
    batch_norm: BatchNormMode = "late",
    weight: Mapping[str, Any] | None = None,
    activation: Mapping[str, Any] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Scheme:
    """One rule for everything, patched by ``weight`` and ``activation``, and then ``rules``."""
    body = Rule(
        "*",
        {**WEIGHT, "bits": weight_bits, **(weight or {})},
        {**ACTIVATION, "bits": activation_bits, **(activation or {})},
    )
    return Scheme("test", {"body": body, **(rules or {})}, batch_norm)


def slow_but(names: Iterable[str], *fast: str) -> list[Any]:
    """Return parameters of a test, of which all but a few are slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


def smooth_images(count: int, size: int = 32) -> Tensor:
    """Random images whose neighbouring pixels are alike."""
    coarse = torch.randn(count, 3, size // 4, size // 4)
    return F.interpolate(coarse, size=(size, size), mode="bicubic") * 1.5


def warm_up(model: nn.Module, x: Tensor) -> nn.Module:
    """Give batch-norms affine parameters of both signs and the statistics of ``x``."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.4)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def calibrate(captured: Captured, *batches: Tensor) -> None:
    """Observe and switch on: weights, then activations; the model ends in eval mode."""
    captured.eval()
    observe(captured, weight_quants(captured), batches[:1])
    observe(captured, activation_quants(captured), batches)


def folded(model: nn.Module, scheme: Scheme, x: Tensor) -> tuple[Captured, Plan]:
    """Prepare ``model``, calibrate it on ``x`` and enter the fold stage."""
    captured, plan = prepare(model, scheme, x[:2])
    calibrate(captured, x)
    fold(captured)
    return captured, plan


def kept_bytes(model, x, forward, pack):
    """Bytes that the backward keeps, a tensor that several operations keep counted once."""
    found, alive = {}, []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def look(t):
        packed = pack(t)
        storage = (t if packed is t else packed.recipe.source).untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(storage)
            found[storage.data_ptr()] = storage.nbytes()
        return packed

    with fused_kernels(), torch.autograd.graph.saved_tensors_hooks(look, kept._unpack):
        y = forward(x)
    assert y.grad_fn is not None
    return sum(found.values())

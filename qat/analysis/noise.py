"""How much each site loses: signal to quantization noise, and the share that is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.calls import on_batch
from qat.fake_quant import FakeQuant, fake_quants
from qat.functional.affine import expand
from qat.quantizers import Deployable


@dataclass(frozen=True)
class SiteNoise:
    """What one site does to the tensors that pass.

    Attributes:
        sqnr: Signal to quantization noise, decibel.
        clipped: Share of the values outside the grid, 0 to 1; 0 where there is no integer grid.
        scale: Mean scale, real units.
    """

    sqnr: float
    clipped: float
    scale: float


class _Probe:
    def __init__(self) -> None:
        self.signal = self.noise = self.clipped = self.count = 0.0

    def __call__(self, fake_quant: FakeQuant, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].detach().float()
        if fake_quant.quantizer.deployable is not Deployable.SIMULATION:
            self.clipped += _count_clipped(fake_quant, x, y)
        self.signal += float(x.square().sum())
        self.noise += float((x - y.detach()).square().sum())
        self.count += x.numel()

    def result(self, fake_quant: FakeQuant) -> SiteNoise:
        ratio = self.signal / max(self.noise, 1e-30)
        sqnr = 10 * torch.log10(torch.tensor(max(ratio, 1e-30))).item()
        scale = fake_quant.quantizer.scale.detach().mean().item()
        return SiteNoise(sqnr, self.clipped / max(self.count, 1), scale)


def _count_clipped(fake_quant: FakeQuant, x: Tensor, y: Tensor) -> float:
    q, spec = fake_quant.quantizer, fake_quant.spec
    codes = q.codes(x)
    nearer_end = (codes == spec.qmin) | (codes == spec.qmax)
    return float((nearer_end & ((x - y).abs() > _half(q.scale, x, y))).sum())


def _half(scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Half a grid step, and a little more for rounding, broadcast against ``x``."""
    return expand(scale.detach(), x.shape) * 0.500001 + y.detach().abs() * 1e-6


@torch.no_grad()
def measure_noise(model: nn.Module, batch: Any) -> dict[str, SiteNoise]:
    """Run ``model`` on a batch and return site name to noise, for all sites that quantize.

    Args:
        model: A prepared model, in eval mode.
        batch: A tensor ``(N, ...)``, or a tuple or mapping of arguments.
    """
    active = [f for f in fake_quants(model) if f.active]
    probes = {f: _Probe() for f in active}
    handles = [f.register_forward_hook(probes[f]) for f in active]
    try:
        on_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {f.site: probes[f].result(f) for f in active if probes[f].count}

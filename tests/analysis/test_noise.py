import math

import pytest
import torch
from torch import nn

from qat.analysis.noise import measure_noise
from qat.fake_quant import FakeQuant, Phase, make_fake_quant
from qat.graph.insert import prepare
from qat.spec import QuantSpec
from tests.helpers import calibrate, make_scheme


def site(spec, low, high, quantizer="uniform"):
    quant = make_fake_quant(
        "here", spec, (4,), quantizer=quantizer, observer="min_max", has_batch=True
    )
    quant.quantizer.set_range(torch.tensor(low), torch.tensor(high))
    quant.calibrated = True
    quant.set_phase(Phase.QUANTIZE)
    return quant.eval()


def test_noise_by_hand():
    quant = site(QuantSpec(3, signed=True, symmetric=True), -4.0, 3.0)  # scale 1, codes -4..3
    x = torch.tensor([0.25, -1.0, 2.5, 1.75])  # becomes 0, -1, 2, 2
    found = measure_noise(nn.Sequential(quant), x)["here"]
    noise = 0.25**2 + 0.5**2 + 0.25**2
    signal = 0.25**2 + 1 + 2.5**2 + 1.75**2
    assert found.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert found.clipped == 0
    assert found.scale == 1.0


def test_clipped_share_by_hand():
    quant = site(QuantSpec(3, signed=True, symmetric=True), -4.0, 3.0)
    # within half a step of an end is rounding, beyond is clipping
    x = torch.tensor([-9.0, -4.6, -4.4, -4.0, 0.0, 3.0, 3.4, 3.6, 100.0, 1.0])
    assert measure_noise(nn.Sequential(quant), x)["here"].clipped == pytest.approx(0.4)


@pytest.mark.parametrize("quantizer", ["fp4", "mx", "nvfp4"])
def test_floats_without_codes_have_noise_and_no_clipped_share(quantizer):
    quant = site(QuantSpec(4), -6.0, 6.0, quantizer)
    x = torch.tensor([0.25, -1.0, 5.2, 6.0])  # with scale 1: 0, -1, 6, 6
    found = measure_noise(nn.Sequential(quant), x)["here"]
    noise = 0.25**2 + 0.8**2
    signal = 0.25**2 + 1 + 5.2**2 + 36
    assert found.sqnr == pytest.approx(10 * math.log10(signal / noise), abs=1e-4)
    assert found.clipped == 0
    assert found.scale == 1.0


def test_unsigned_grids_clip_what_is_negative():
    quant = site(QuantSpec(2, signed=False), 0.0, 3.0)
    x = torch.tensor([-1.0, -0.4, 0.4, 3.0])
    assert measure_noise(nn.Sequential(quant), x)["here"].clipped == 0.25


def test_sums_run_over_all_calls_of_a_site():
    quant = site(QuantSpec(3), -4.0, 3.0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant = quant

        def forward(self, x):
            return self.quant(x) + self.quant(x * 100)

    found = measure_noise(Twice(), torch.tensor([1.0, 2.0]))["here"]
    assert found.clipped == 0.5


def test_exact_values_have_no_noise():
    quant = site(QuantSpec(4), -8.0, 7.0)
    found = measure_noise(nn.Sequential(quant), torch.tensor([1.0, -3.0]))["here"]
    assert found.sqnr > 100
    assert found.clipped == 0


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_uniform_noise_is_a_twelfth_of_the_squared_step(bits):
    quant = site(QuantSpec(bits), -1.0, 1.0)
    x = torch.rand(4, 4096) * 2 - 1  # a variance of 1/3
    step = 1 / (2 ** (bits - 1) - 1)
    expected = 10 * math.log10(1 / 3 / (step**2 / 12))
    assert measure_noise(nn.Sequential(quant), x)["here"].sqnr == pytest.approx(expected, abs=0.3)


def test_all_quantizing_sites_of_a_model_and_no_others():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    x = torch.randn(8, 3, 8, 8)
    captured, plan = prepare(model, make_scheme(4, 8), x[:2])
    assert measure_noise(captured.eval(), x) == {}
    calibrate(captured, x)
    found = measure_noise(captured, x)
    assert set(found) == {*plan.activations, *(f"{n}.weight" for n in plan.weights)}
    assert all(n.clipped == 0 for n in found.values())  # ranges were those of x
    assert found["4.weight"].sqnr < found["2"].sqnr  # 4 bits against 8
    off = next(m for m in captured.modules() if isinstance(m, FakeQuant) and m.site == "2")
    off.phase = Phase.FLOAT
    assert "2" not in measure_noise(captured, x)
    assert not any(m._forward_hooks for m in captured.modules())


def test_hooks_are_gone_after_an_error():
    quant = site(QuantSpec(4), -1.0, 1.0)
    with pytest.raises(RuntimeError):
        measure_noise(nn.Sequential(quant, nn.Linear(3, 3)), torch.randn(2, 5))
    assert not quant._forward_hooks

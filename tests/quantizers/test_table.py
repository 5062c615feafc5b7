"""Lookup: every value gets the code of the thresholds below it, up to the last bit."""

import pytest
import torch

from qat.quantizers.table import TableQuantizer, first_reaching
from qat.spec import QuantSpec


class Fixed(TableQuantizer):
    """Four codes between thresholds that no float32 scale meets exactly."""

    def __init__(self, spec, scale, *, has_batch=True):
        super().__init__(spec, tuple(scale.shape), has_batch=has_batch)
        self.fixed = scale

    @property
    def scale(self):
        return self.fixed

    @property
    def learns(self):
        return False

    def set_scale(self, scale):
        self.fixed = scale

    def grid(self):
        return torch.tensor([-0.3, 0.0, 1.7]), torch.tensor([-5.0, -1.0, 0.0, 7.0])

    def forward(self, x):
        return self.snap(x, self.codes(x), x.float())


def neighbours(values):
    up, down = values.clone(), values.clone()
    found = [values]
    for _ in range(6):
        up = up.nextafter(torch.full_like(up, torch.inf))
        down = down.nextafter(torch.full_like(down, -torch.inf))
        found += [up, down]
    return torch.cat(found)


@pytest.mark.parametrize("scale", [*torch.rand(50).mul(3).tolist(), 2.0**-26, 1.0, 1e6])
def test_table_gives_the_codes_of_every_float_around_every_threshold(scale):
    quantizer = Fixed(QuantSpec(4), torch.tensor(scale))
    thresholds, codes = quantizer.table()
    assert torch.equal(thresholds, thresholds.sort().values)
    x = neighbours(torch.cat([thresholds, torch.randn(100) * scale]))
    below = (thresholds <= x[:, None]).sum(1)
    assert torch.equal(codes[below], quantizer.codes(x))
    assert torch.equal(quantizer.codes(thresholds), codes[1:])  # on a threshold: the code above


@pytest.mark.parametrize("scale", [*torch.rand(50).add(0.01).tolist(), 1e6])
def test_first_reaching_is_the_lowest(scale):
    thresholds, scale = torch.randn(50), torch.tensor(scale)
    lowest = first_reaching(thresholds, scale)
    assert (lowest / scale >= thresholds).all()
    before = lowest.nextafter(torch.full_like(lowest, -torch.inf))
    assert (before / scale < thresholds).all()


def test_each_channel_is_looked_up_in_units_of_its_own_scale():
    scale = torch.tensor([[1.0], [4.0]])
    quantizer = Fixed(QuantSpec(4, axis=0), scale, has_batch=False)
    x = torch.tensor([[-9.0, -0.2, 0.0, 2.0], [-9.0, -0.2, 6.0, 7.0]])
    assert torch.equal(quantizer.codes(x), torch.tensor([[-5.0, -1, 0, 7], [-5, -1, 0, 7]]))
    assert torch.equal(quantizer(x), quantizer.codes(x) * scale)


@pytest.mark.parametrize("bits", [8, 9])
def test_value_is_exact_gradient_is_the_surrogates_dtype_is_that_of_x(bits):
    quantizer = Fixed(QuantSpec(bits), torch.tensor(0.7))
    x = torch.randn(50).bfloat16().requires_grad_()
    y = quantizer(x)
    expected = quantizer.codes(x) * torch.tensor(0.7)
    assert torch.equal(y, expected if bits > 8 else expected.bfloat16())
    y.float().sum().backward()
    assert torch.equal(x.grad, torch.ones(50).bfloat16())

"""Lookup: every value gets the code of the thresholds below it, up to the last bit."""

import pytest
import torch

from qat.functional.affine import dequantize
from qat.quantizers import QUANTIZERS, Deployable
from qat.quantizers.table import TableQuantizer, first_reaching
from qat.spec import QuantSpec

SHAPE = (3, 4, 5)
SCALES = torch.rand(50, generator=torch.Generator().manual_seed(0))
ACTIVATIONS = {
    "apot": [QuantSpec(bits, signed=s) for bits in range(2, 7) for s in (True, False)],
    "binary": [QuantSpec(1), QuantSpec(1, signed=False), QuantSpec(1, power_of_two=True)],
    "ir_net": [QuantSpec(1), QuantSpec(1, signed=False)],
    "n2uq": [*(QuantSpec(bits, signed=False) for bits in (1, 2, 4, 8)), QuantSpec(2), QuantSpec(8)],
    "power_of_two": [QuantSpec(4), QuantSpec(3, signed=False), QuantSpec(4, power_of_two=True)],
}
WEIGHTS = {
    "apot": [
        QuantSpec(4),
        QuantSpec(5, axis=0, narrow=True),
        QuantSpec(3, axis=0, group_size=2),
        QuantSpec(4, axis=0, power_of_two=True),
    ],
    "binary": [
        QuantSpec(1),
        QuantSpec(1, axis=0, narrow=True),
        QuantSpec(1, axis=0, power_of_two=True),
    ],
    "ir_net": [QuantSpec(1), QuantSpec(1, axis=0, narrow=True), QuantSpec(1, axis=0, group_size=2)],
    "power_of_two": [QuantSpec(4, axis=0)],
    "ternary": [QuantSpec(2), QuantSpec(2, axis=0, narrow=True), QuantSpec(2, power_of_two=True)],
    "ternary_learned": [QuantSpec(2), QuantSpec(2, axis=0), QuantSpec(2, axis=0, group_size=2)],
}
CASES = [(name, spec, True) for name, specs in ACTIVATIONS.items() for spec in specs]
CASES += [(name, spec, False) for name, specs in WEIGHTS.items() for spec in specs]
every_case = pytest.mark.parametrize(("name", "spec", "has_batch"), CASES, ids=str)


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


@pytest.mark.parametrize("scale", [*(3 * SCALES).tolist(), 2.0**-26, 1.0, 1e6])
def test_table_gives_the_codes_of_every_float_around_every_threshold(scale):
    quantizer = Fixed(QuantSpec(4), torch.tensor(scale))
    thresholds, codes = quantizer.table()
    assert torch.equal(thresholds, thresholds.sort().values)
    x = neighbours(torch.cat([thresholds, torch.randn(100) * scale]))
    below = (thresholds <= x[:, None]).sum(1)
    assert torch.equal(codes[below], quantizer.codes(x))
    assert torch.equal(quantizer.codes(thresholds), codes[1:])  # on a threshold: the code above


@pytest.mark.parametrize("scale", [*(SCALES + 0.01).tolist(), 1e6])
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


def make(name, spec, has_batch):
    """Return a quantizer that saw a tensor and a range."""
    quantizer = QUANTIZERS[name](spec, spec.scale_shape(SHAPE), has_batch=has_batch)
    quantizer.follow(torch.randn(SHAPE))
    span = torch.rand(spec.scale_shape(SHAPE)) + 2.5
    quantizer.set_range(-span, span)
    return quantizer


def test_every_quantizer_that_looks_up_is_a_case():
    looking = {name for name, k in QUANTIZERS.items() if k.deployable is Deployable.TABLE}
    assert looking - {"dorefa"} == {name for name, _, _ in CASES}  # that one is in test_base


@every_case
def test_value_is_scale_times_code_and_codes_lie_in_their_format(name, spec, has_batch):
    quantizer, x = make(name, spec, has_batch), torch.randn(SHAPE) * 3
    x[0, 0, 0] = 0.0
    codes, ends = quantizer.codes(x), quantizer.code_spec
    assert torch.equal(dequantize(codes, quantizer.scale, quantizer.zero_point), quantizer(x))
    assert torch.equal(codes, codes.round())
    assert ends.qmin <= codes.min() < codes.max() <= ends.qmax
    assert (ends.axis, ends.group_size) == (spec.axis, spec.group_size)
    assert has_batch or ends.narrow  # so that a weight's code can change its sign
    if spec.power_of_two:
        assert torch.equal(quantizer.scale.log2(), quantizer.scale.log2().round())


@every_case
def test_state_is_complete_and_shaped_at_birth(name, spec, has_batch):
    fresh = QUANTIZERS[name](spec, spec.scale_shape(SHAPE), has_batch=has_batch)
    quantizer, x = make(name, spec, has_batch), torch.randn(SHAPE)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in quantizer.parameters()]
    assert not torch.equal(fresh(x), quantizer(x))
    fresh.load_state_dict(quantizer.state_dict(), strict=True)
    assert torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize(
    ("name", "spec"), [(n, s) for n, specs in ACTIVATIONS.items() for s in specs], ids=str
)
def test_table_is_all_an_activation_needs(name, spec):
    quantizer = make(name, spec, has_batch=True)
    assert isinstance(quantizer, TableQuantizer)
    thresholds, codes = quantizer.table()
    assert thresholds.dtype == codes.dtype == torch.float32
    assert len(codes) == len(thresholds) + 1
    x = neighbours(torch.cat([thresholds, torch.randn(100) * 2]))
    assert torch.equal(codes[(thresholds <= x[:, None]).sum(1)], quantizer.codes(x))

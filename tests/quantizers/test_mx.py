"""MX and NVFP4: along which axis blocks lie, and that calibration moves no value."""

import pytest
import torch

from qat.errors import SpecError
from qat.fake_quant import Phase, make_fake_quant
from qat.functional.block_formats import mx, nvfp4
from qat.functional.float_formats import FLOAT_FORMATS
from qat.quantizers import MX, NVFP4, QUANTIZERS
from qat.spec import QuantSpec

FORMATS = {
    "fp8_e4m3": (8, "e4m3"),
    "fp8_e5m2": (8, "e5m2"),
    "fp6_e3m2": (6, "e3m2"),
    "fp6_e2m3": (6, "e2m3"),
    "fp4": (4, "e2m1"),
}


def quantizers(*, has_batch):
    """Yield every format with the function on rows that it should be."""
    for format, (bits, name) in FORMATS.items():
        form = FLOAT_FORMATS[name]
        made = MX(QuantSpec(bits), (), has_batch=has_batch, format=format)
        yield made, lambda rows, form=form: mx(rows, form)
    yield NVFP4(QuantSpec(4), (), has_batch=has_batch), nvfp4


@pytest.mark.parametrize("shape", [(6, 40), (6, 5, 3, 3), (6, 20, 3), (40,)])
def test_blocks_of_weights_run_along_all_axes_but_the_first(shape):
    w = torch.randn(shape)
    for quantizer, rounded in quantizers(has_batch=False):
        rows = w.reshape(shape[0], -1) if len(shape) > 1 else w
        assert torch.equal(quantizer(w), rounded(rows).reshape(shape))


def test_blocks_of_images_run_along_channels():
    x = torch.randn(2, 40, 3, 5)
    for quantizer, rounded in quantizers(has_batch=True):
        expected = torch.empty_like(x)
        if isinstance(quantizer, MX):
            for n, i, j in torch.cartesian_prod(*(torch.arange(s) for s in (2, 3, 5))).tolist():
                expected[n, :, i, j] = rounded(x[n, :, i, j])
        else:  # the tensor's scale is that of all pixels
            expected = rounded(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.equal(quantizer(x), expected)


@pytest.mark.parametrize("shape", [(6, 40), (2, 7, 40), (40,)])
def test_blocks_of_other_activations_run_along_the_last_axis(shape):
    x = torch.randn(shape)
    for quantizer, rounded in quantizers(has_batch=True):
        assert torch.equal(quantizer(x), rounded(x))


@pytest.mark.parametrize("has_batch", [False, True], ids=["weight", "activation"])
def test_gradient_is_1_everywhere(has_batch):
    for quantizer, _ in quantizers(has_batch=has_batch):
        x = (torch.randn(4, 33, 2, 2) * 100).requires_grad_()
        given = torch.randn(x.shape)
        quantizer(x).backward(given)
        assert x.grad is not None
        assert torch.equal(x.grad, given)


def test_half_floats_come_back_as_half_floats():
    x = torch.randn(3, 50, dtype=torch.bfloat16)
    for quantizer, rounded in quantizers(has_batch=True):
        assert torch.equal(quantizer(x), rounded(x.float()).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["mx", "nvfp4"])
def test_what_calibration_saw_changes_no_value(name):
    x, results = torch.randn(4, 64), []
    for size in (0.1, 100.0):
        quant = make_fake_quant("here", QuantSpec(4), (4, 64), quantizer=name,
                                observer="min_max", has_batch=True)  # fmt: skip
        quant.set_phase(Phase.OBSERVE)
        quant(torch.randn(4, 64) * size)
        quant.finish_calibration()
        quant.set_phase(Phase.QUANTIZE)
        results.append(quant(x))
        quant.set_phase(Phase.FROZEN)
        assert torch.equal(quant.eval()(x), results[-1])
    assert torch.equal(*results)
    assert not torch.equal(results[0], x)


@pytest.mark.parametrize("name", ["mx", "nvfp4"])
def test_scale_for_people_is_that_of_the_observed_range(name):
    quantizer = QUANTIZERS[name](QuantSpec(4), (), has_batch=True)
    quantizer.set_range(torch.tensor(-12.0), torch.tensor(3.0))
    assert float(quantizer.scale) == 2.0


def test_unknown_element_is_refused():
    with pytest.raises(SpecError, match=r"'fp4', .*'fp8_e5m2'\], got 'int8'"):
        MX(QuantSpec(8), (), has_batch=False, format="int8")

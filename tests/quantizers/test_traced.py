"""Quantizers inside a compiled step: dynamo's graph has the gradients that autograd has."""

import pytest
import torch

from qat.errors import SpecError
from qat.quantizers import QUANTIZERS
from qat.spec import QuantSpec

SPECS = [
    QuantSpec(1, narrow=False),
    QuantSpec(2, narrow=True),
    QuantSpec(4),
    QuantSpec(4, signed=False),
    QuantSpec(8, signed=False, symmetric=False),
    QuantSpec(8),
]


def suited(name):
    """Return a quantizer of the first format that it takes."""
    for spec in SPECS:
        for has_batch in (False, True):
            try:
                return QUANTIZERS[name](spec, (), has_batch=has_batch)
            except SpecError:
                continue
    raise AssertionError(f"no format for {name}")


def gradients(quantizer, call, x, upstream):
    x = x.clone().requires_grad_()
    for parameter in quantizer.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    call(x).backward(upstream)
    return [x.grad, *(parameter.grad for parameter in quantizer.parameters())]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_gradients_are_those_without_a_compiler(name):
    torch.manual_seed(0)
    quantizer = suited(name).train()
    x, upstream = torch.randn(2, 64, 32)
    torch._dynamo.reset()
    compiled = torch.compile(quantizer.forward, backend="eager")
    ours = gradients(quantizer, compiled, x, upstream)
    theirs = gradients(quantizer, quantizer, x, upstream)
    assert ours[0] is not None
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)

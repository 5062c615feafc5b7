"""Compiled functions: one for every size, and what they read as codes or as values."""

import pytest
import torch

from qat.functional import fused, inductor, kept
from qat.functional.elements import SMOOTH, Addend
from qat.functional.fused import Front, Grid, fused_fake_quantize, fused_kernels
from qat.functional.inductor import Kernel
from qat.functional.kept import find_codes, kept_as_codes, rearranged
from qat.functional.products import matmul
from tests.helpers import slow_but

GRID = Grid(torch.tensor(0.05), torch.tensor(3.0), 0, 255)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


def test_a_kernel_is_compiled_once_for_all_sizes_and_once_for_each_mix_of_types(monkeypatch):
    made = []
    compiled = inductor._compile
    monkeypatch.setattr(inductor, "_compile", lambda *args: made.append(1) or compiled(*args))
    kernel = Kernel("cpu", lambda x, y: (x.float() if y is None else x.float() + y,), ("rb", "r1"))
    for rows, columns in [(2, 3), (5, 2), (64, 64), (2, 1000), (300, 7)]:
        x, y = torch.randn(rows, columns), torch.randn(rows, 1)
        assert torch.equal(kernel(x, y)[0], x + y)
        assert torch.equal(kernel(x, None)[0], x)
    assert len(made) == 2
    half = torch.randn(4, 4).to(torch.bfloat16)
    assert torch.equal(kernel(half, None)[0], half.float())
    assert len(made) == 3


def test_other_numbers_of_threads_compile_anew(monkeypatch):
    made = []
    compiled = inductor._compile
    monkeypatch.setattr(inductor, "_compile", lambda *args: made.append(1) or compiled(*args))
    kernel, x = Kernel("cpu", lambda x: (x * 2,), ("n",)), torch.randn(9)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert torch.equal(kernel(x)[0], x * 2)
    finally:
        torch.set_num_threads(before)
    assert len(made) == 2


@pytest.mark.parametrize("name", slow_but(SMOOTH, "gelu", "hardswish"))
def test_gradients_of_activation_functions(name):
    """Away from ties and ends, those that autograd finds; without a grid's steps in between."""
    x = torch.linspace(-6, 6, 4001, requires_grad=True)
    upstream = torch.randn(4001)
    fine = Grid(torch.tensor(2.0**-12), torch.tensor(0.0), -(2**20), 2**20)  # ends lie outside
    y = SMOOTH[name].values(x)
    (expected,) = torch.autograd.grad(y, x, upstream)
    with fused_kernels():
        found = fused_fake_quantize(x, fine, Front(activation=name))
        assert found is not None
        (gradient,) = torch.autograd.grad(found, x, upstream)
    torch.testing.assert_close(found, y, rtol=0, atol=2.0**-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def on_grid(*shape):
    """Values of the fused kernels, which are known as codes, in layouts of a transformer."""
    x = torch.randn(shape) * 3
    y = fused_fake_quantize(x.requires_grad_(), GRID)
    assert y is not None
    return y


def test_what_is_added_may_be_codes():
    x = torch.randn(8, 100).requires_grad_()
    upstream, results = torch.randn(8, 100), []
    with fused_kernels(), kept_as_codes():
        known = on_grid(8, 100)
        for other in (known, known.detach().clone().requires_grad_()):
            assert (find_codes(other) is not None) == (other is known)
            y = fused_fake_quantize(x, GRID, Front(other))
            assert y is not None
            results.append((y, *torch.autograd.grad(y, (x, other), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_floats_are_added_as_they_are():
    """They lie beside their grid; the codes would add other values."""
    with fused_kernels(), kept_as_codes():
        x = torch.randn(8, 100, dtype=torch.bfloat16)
        other = fused_fake_quantize(torch.randn(8, 100).to(torch.bfloat16) * 3, GRID)
        assert other is not None
        assert find_codes(other) is not None
        sums = [fused_fake_quantize(x, GRID, Front(y)) for y in (other, other.clone())]
    assert sums[0] is not None
    assert sums[1] is not None
    assert torch.equal(*sums)


def test_nothing_is_added_by_an_empty_addend():
    x = torch.randn(7)
    assert torch.equal(Addend().add_to(x), x)


def test_copies_of_codes_are_codes():
    with fused_kernels(), kept_as_codes():
        known = on_grid(4, 6, 10)
        copied = rearranged(known.transpose(1, 2), lambda t: t.flatten(1))
        viewed = rearranged(known, lambda t: t.flatten(1))
        codes = find_codes(copied)
        assert codes is not None
        assert torch.equal(codes.recipe.values(), copied)
        assert copied.is_contiguous()
        assert viewed.data_ptr() == known.data_ptr()
        plain = rearranged(torch.randn(4, 6).t(), lambda t: t.contiguous())
        assert find_codes(plain) is None


def test_what_was_changed_is_no_longer_kept_as_codes():
    with fused_kernels(), kept_as_codes():
        known = on_grid(4, 6)
        assert find_codes(known.detach()) is not None
        known.detach().mul_(2)
        assert find_codes(known.detach()) is None


@pytest.mark.parametrize(
    "shapes", [((3, 2, 5, 4), (3, 2, 4, 6)), ((5, 4), (4, 6)), ((2, 5, 4), (4, 6))]
)
def test_products_are_those_of_torch(shapes):
    a, b = (torch.randn(shape).requires_grad_() for shape in shapes)
    ours, theirs = matmul(a, b), torch.matmul(a, b)
    upstream = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    for x, y in zip(
        *(torch.autograd.grad(p, (a, b), upstream) for p in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_transposed_factors_are_kept_as_codes():
    packed = []
    hooks = (lambda t: packed.append(kept._pack(t)) or packed[-1], kept._unpack)
    with fused_kernels():
        q = on_grid(3, 7, 2, 4).transpose(1, 2)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = matmul(q, q.transpose(-2, -1))
    assert [type(kept_tensor).__name__ for kept_tensor in packed] == ["_View", "_View"]
    (gradient,) = torch.autograd.grad(y.sum(), q)
    expected = (torch.ones_like(y) @ q.detach()) * 2
    torch.testing.assert_close(gradient, expected)

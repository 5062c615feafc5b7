"""The chip without floats against the reference that rounds as runtimes do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.codecs import ActivationCodec
from qat.errors import VerificationError
from qat.export.onnx import export_onnx
from qat.export.verify import compare_sites
from qat.graph.convert import convert
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from tests.graph.test_convert import NETS, Moves, make
from tests.helpers import folded, make_scheme, smooth_images, warm_up


def compare(model: nn.Module, x: Tensor) -> tuple[int, float, ChipRun]:
    """Return the largest difference of a code and the share that differs, each site by itself.

    Behind a site the chip goes on with the reference's codes.
    """
    expected: list[Tensor] = []
    differences: list[Tensor] = []

    def keep(_: ActivationCodec, codes: Tensor) -> Tensor:
        expected.append(codes)
        return codes

    def against(_: ActivationCodec, codes: Tensor) -> Tensor:
        differences.append((codes - expected[len(differences)]).abs().flatten())
        return expected[len(differences) - 1]

    IntegerRun(model, keep)(x)  # pyright: ignore[reportArgumentType]
    chip = ChipRun(model, against)  # pyright: ignore[reportArgumentType]
    chip(x)
    assert len(differences) == len(expected) > 1
    every = torch.cat(differences)
    return int(every.max()), (every > 0).double().mean().item(), chip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("net", NETS)
def test_every_layer_at_every_width(net, bits):
    model, x = make(net)
    captured, _ = folded(warm_up(model, x), make_scheme(bits, bits), x)
    largest, share, chip = compare(captured, x)
    assert largest <= 1
    assert share <= 1e-3  # ties, which the chip rounds upwards
    assert chip.float_ops == {}
    assert torch.equal(ChipRun(captured)(x), ChipRun(convert(captured))(x))


@pytest.mark.parametrize("activation", [{"symmetric": False, "signed": False}, {"signed": True}])
def test_padding_is_with_the_zero_point(activation):
    model, x = make("conv")
    captured, _ = folded(warm_up(model, x), make_scheme(8, 8, activation=activation), x + 1)
    largest, share, chip = compare(captured, x + 1)
    assert largest <= 1
    assert share <= 1e-3
    assert chip.float_ops == {}


@pytest.mark.parametrize(("weight", "activation"), [(16, 8), (8, 16), (12, 9)])
def test_wide_codes_are_summed_in_48_bits(weight, activation):
    model, x = make("conv")
    captured, _ = folded(warm_up(model, x), make_scheme(weight, activation), x)
    largest, _, chip = compare(captured, x)
    assert largest <= 1 + 2**activation / 2**15  # their multipliers have 15 bits
    assert chip.float_ops == {}


def test_the_largest_accumulator_of_every_layer_is_known():
    model, x = make("linear")
    captured, _ = folded(warm_up(model, x), make_scheme(), x)
    seen: list[Tensor] = []
    chip = ChipRun(captured, lambda g, codes: (seen.append(codes - g.zero_point.float()), codes)[1])
    chip(x)
    parts = captured.get_submodule("0").integers()  # pyright: ignore[reportCallIssue]
    sums = seen[0].long() @ parts.weight.long().T + parts.bias.long()
    assert chip.largest["0"] == sums.abs().max()
    assert list(chip.largest) == ["0", "3", "7"]


class Sums(nn.Module):
    """A layer whose sums do not fit 32 bits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2, bias=False)
        self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("run", [IntegerRun, ChipRun])
@pytest.mark.parametrize(("width", "fits"), [(133_144, True), (133_145, False)])
def test_an_overflow_is_named(run, width, fits):
    model = Sums(width)
    nn.init.ones_(model.first.weight)  # 127 * 127 * 133,144.1 = 2**31
    x = torch.ones(4, width)
    captured, _ = folded(model, make_scheme(), x)
    if fits:
        run(captured)(x)
        return
    with pytest.raises(VerificationError, match="sums of 'first' that fit 32 bits, got one of 2,1"):
        run(captured)(x)


class Mixed(nn.Module):
    """Residuals, gates, joins and pools, and a normalisation, which has no integer form."""

    def __init__(self, normalise: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(16) if normalise else nn.Identity()
        self.bn, self.end = nn.BatchNorm2d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(F.avg_pool2d(x, 3, 1, 1)) + x)
        x = x * F.relu6(self.gate(x.mean((2, 3), keepdim=True)))
        x = F.relu(self.bn(torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1)], 1)))
        return self.end(self.norm(x.mean((2, 3))))


@pytest.mark.parametrize(("normalise", "floats"), [(False, []), (True, ["layer_norm"])])
def test_sums_gates_joins_and_pools_stay_integers(normalise, floats):
    torch.manual_seed(0)
    x = smooth_images(16)
    captured, _ = folded(warm_up(Mixed(normalise), x), make_scheme(), x)
    largest, share, chip = compare(captured, x)
    assert largest <= 1
    assert share <= 1e-3
    assert list(chip.float_ops.values()) == floats


class Functions(nn.Module):
    """Every function that can be looked up, and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.silu, self.gelu, self.d = nn.SiLU(), nn.GELU(), nn.Conv2d(8, 8, 1)
        self.end = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.b(self.silu(self.a(x))))
        x = torch.tanh(self.c(F.hardswish(self.d(x)))).mean((2, 3))
        return self.end(torch.softmax(self.end.weight.shape[0] * x, 1) * torch.sigmoid(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_functions_are_looked_up_where_the_scheme_says_so(bits, tmp_path):
    torch.manual_seed(0)
    x = smooth_images(16)
    scheme = replace(make_scheme(bits, bits), functions="table")
    captured, plan = folded(Functions(), scheme, x)
    assert {"a", "b", "c", "d"} <= set(plan.activations)
    largest, share, chip = compare(captured, x)
    assert largest <= 1
    assert share <= 2e-3  # ties, and shares of a softmax with exponentials of 16 bits
    assert set(chip.float_ops.values()) <= {"mul"}  # by a constant, in front of the softmax
    converted = convert(captured)
    sites = export_onnx(converted, x[:1], tmp_path / "m.onnx")
    found = compare_sites(partial(IntegerRun, converted), tmp_path / "m.onnx", sites, x)
    assert max(s.largest for s in found) <= 1
    assert sum(s.share for s in found) / len(found) <= 1e-3  # functions round in float there


def test_functions_stay_in_float_otherwise():
    x = smooth_images(16)
    captured, plan = folded(Functions(), make_scheme(), x)
    assert not {"a", "b", "c", "d"} & set(plan.activations)
    chip = ChipRun(captured)
    chip(x)
    assert {"silu", "gelu", "hardswish", "tanh"} <= set(chip.float_ops.values())


def test_moved_codes_stay_codes():
    x = torch.randn(16, 3, 8, 8)
    captured, _ = folded(Moves(), make_scheme(4, 8), x)
    largest, share, chip = compare(captured, x)
    assert largest <= 1
    assert share <= 1e-3
    assert chip.float_ops == {}


def test_windows_that_count_differently_run_in_float():
    class Border(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
            self.end = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.pool(x)).mean((2, 3))

    x = smooth_images(4, 8)
    captured, _ = folded(Border(), make_scheme(), x)
    chip = ChipRun(captured)
    chip(x)
    assert list(chip.float_ops.values())[:1] == ["average_pool"]

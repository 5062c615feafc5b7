"""Integer arithmetic against integer kernels, exhaustively where the operands are 8-bit codes."""

import itertools
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

from qat.codecs import ActivationCodec
from qat.fake_quant import make_fake_quant
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.layers import fold
from qat.reference.run import IntegerRun
from qat.reference.values import Accumulator, Average, Clipped, Codes, Product, Sum
from qat.spec import QuantSpec
from tests.graph.test_convert import NETS, make
from tests.helpers import calibrate, folded, make_scheme, warm_up

SCALES = [(0.017, 3), (0.0301, 0), (0.11, 128), (1 / 3, 77)]


def grid(scale: float, zero_point: int) -> ActivationCodec:
    spec = QuantSpec(8, signed=False, symmetric=False)
    quant = make_fake_quant(
        "site", spec, (1, 1), quantizer="uniform", observer="min_max", has_batch=True
    )
    quant.quantizer.set_scale(torch.tensor(scale))
    quant.quantizer.zero_point.fill_(zero_point)
    return ActivationCodec.of(quant)


def on_grid(codes: torch.Tensor, codec: ActivationCodec) -> Codes:
    return Codes(codes.float() - codec.zero_point.float(), codec)


def kernel(
    op: str, inputs: list[torch.Tensor], codecs: list[ActivationCodec], domain: str, **options: Any
):
    """Run one integer operator of onnxruntime on stored codes; the last codec is the output's."""
    names, feeds, constants = [], {}, []
    for i, codec in enumerate(codecs):
        if i < len(inputs):
            names.append(f"x{i}")
            feeds[f"x{i}"] = inputs[i].numpy()
        for kind, value in (("s", codec.scale), ("z", codec.zero_point)):
            constants.append(numpy_helper.from_array(value.numpy(), f"{kind}{i}"))
            names.append(f"{kind}{i}")
    node = helper.make_node(op, names, ["y"], domain=domain, **options)
    values = [
        helper.make_tensor_value_info(k, TensorProto.UINT8, v.shape) for k, v in feeds.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", values, [result], constants)
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, feeds)
    return torch.from_numpy(y).float()


@pytest.mark.parametrize(("a", "b", "c"), list(itertools.permutations(SCALES, 3))[::2])
def test_sums_of_all_pairs_of_codes_are_those_of_the_kernel(a, b, c):
    codecs = [grid(*a), grid(*b), grid(*c)]
    every = torch.arange(256, dtype=torch.uint8)
    left, right = (t.contiguous().flatten() for t in torch.meshgrid(every, every, indexing="ij"))
    ours = Sum(on_grid(left, codecs[0]), on_grid(right, codecs[1])).codes(codecs[2]).clamp(0, 255)
    theirs = kernel("QLinearAdd", [left, right], codecs, "com.microsoft")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("a", "b", "c"), list(itertools.permutations(SCALES, 3)))
def test_products_of_all_pairs_of_codes_are_those_of_the_kernel(a, b, c):
    codecs = [grid(*a), grid(*b), grid(*c)]
    every = torch.arange(256, dtype=torch.uint8)
    left, right = (t.contiguous().flatten() for t in torch.meshgrid(every, every, indexing="ij"))
    product = Product(on_grid(left, codecs[0]), on_grid(right, codecs[1]))
    theirs = kernel("QLinearMul", [left, right], codecs, "com.microsoft")
    assert torch.equal(product.codes(codecs[2]).clamp(0, 255), theirs)


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations([*SCALES, (0.017, 2)], 2)))
@pytest.mark.parametrize(("padding", "counted"), [(0, False), (1, False), (1, True)])
def test_averages_of_windows_are_those_of_the_kernel(a, b, padding, counted):
    codecs = [grid(*a), grid(*b)]
    x = torch.randint(0, 256, (4, 64, 12, 12), dtype=torch.uint8)
    options = {"strides": [2, 2], "pads": [padding] * 4, "count_include_pad": int(counted)}
    theirs = kernel(
        "QLinearAveragePool", [x], codecs, "com.microsoft", kernel_shape=[3, 2], **options
    )
    real = on_grid(x, codecs[0]).real()
    values = F.avg_pool2d(real, (3, 2), 2, padding, count_include_pad=counted)
    assert torch.equal(Average(values).codes(codecs[1]).clamp(0, 255), theirs)


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(SCALES, 2)))
@pytest.mark.parametrize("size", [1, 3, 8])
def test_averages_are_those_of_the_kernel(a, b, size):
    codecs = [grid(*a), grid(*b)]
    x = torch.randint(0, 256, (2, 512, size, size), dtype=torch.uint8)
    steps = on_grid(x, codecs[0]).steps.double().sum((2, 3), keepdim=True).float()
    ours = Accumulator(steps, codecs[0].scale, size * size).codes(codecs[1]).clamp(0, 255)
    theirs = kernel("QLinearGlobalAveragePool", [x], codecs, "com.microsoft")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("a", "c"), list(itertools.permutations(SCALES, 2)))
def test_requantization_of_all_products_of_codes_is_that_of_the_kernel(a, c):
    codecs = [grid(*a), grid(0.0071, 11), grid(*c)]
    every = torch.arange(256, dtype=torch.uint8)
    x, w = every[:, None], every[None, :]
    sums = on_grid(x, codecs[0]).steps @ on_grid(w, codecs[1]).steps
    scale = codecs[0].scale * codecs[1].scale
    ours = Accumulator(sums, scale).codes(codecs[2]).clamp(0, 255)
    assert torch.equal(ours, kernel("QLinearMatMul", [x, w], codecs, ""))


@pytest.mark.parametrize("high", [6.0, float("inf")])
@pytest.mark.parametrize(("scale", "zero_point"), SCALES)
def test_clipping_codes_is_clipping_values(scale, zero_point, high):
    target, source = grid(scale, zero_point), grid(0.09, 120)
    values = on_grid(torch.arange(256), source)
    pending = Accumulator(values.steps, source.scale)
    clipped = Clipped(pending, 0.0, high)
    expected = target.codes(pending.real().double().clamp(0.0, high).float()).float()
    got = clipped.codes(target).clamp(target.qmin, target.qmax)
    assert (got - expected).abs().max() <= 1  # float rounds twice, so a tie may turn
    assert (got != expected).sum() <= 1
    assert torch.equal(clipped.real(), pending.real().clamp(0.0, high))


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
@pytest.mark.parametrize("net", NETS)
def test_fold_stage_and_converted_run_alike_and_as_simulated(net, batch_norm):
    model, x = make(net)
    captured, _ = folded(warm_up(model, x), make_scheme(4, 4, batch_norm=batch_norm), x)
    converted = convert(captured)
    for batch in (x, torch.randn_like(x) * 2):
        logits = IntegerRun(captured)(batch)
        assert torch.equal(logits, IntegerRun(converted)(batch))
        step = captured(batch).abs().max() / 15
        different = (logits - captured(batch)).abs() > 1e-4 * step
        assert different.double().mean() <= 2 / 16  # a tie turns a row of outputs


class Wide(nn.Module):
    """An accumulator that float32 does not hold exactly."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8192, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_accumulators_beyond_24_bits_are_exact():
    torch.manual_seed(0)
    x = torch.rand(16, 8192)
    model = Wide()
    nn.init.uniform_(model.first.weight, 0.5, 1.0)
    captured, _ = folded(model, make_scheme(), x)
    first = captured.get_submodule("first")
    seen = []
    run = IntegerRun(captured, lambda g, codes: (seen.append((g, codes)), codes)[1])
    run(x)
    parts = first.integers()  # pyright: ignore[reportCallIssue]
    steps = seen[0][1].long() - seen[0][0].zero_point.long()
    sums = steps @ parts.weight.long().T + parts.bias.long()
    assert sums.abs().max() > 2**24
    target = seen[1][0]
    multiplier = seen[0][0].scale * parts.weight_scale.flatten() / target.scale
    expected = (sums.float() * multiplier).round() + target.zero_point.float()
    assert torch.equal(seen[1][1], expected.clamp(target.qmin, target.qmax))


class Standardised(nn.Conv2d):
    """A convolution whose forward is its own: integers of the raw weight would be wrong here."""

    def forward(self, input):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias)


class Odd(nn.Module):
    """What has no integer kernel, or none for these formats."""

    def __init__(self):
        super().__init__()
        self.own = Standardised(3, 4, 3)
        self.conv = nn.Conv2d(4, 4, 3)
        self.end = nn.Linear(4, 3)

    def forward(self, x):
        a = self.own(F.pad(x, (1, 1, 1, 1))).relu()
        left, right = F.silu(self.conv(a)).chunk(2, 1)
        y = torch.cat([left, right * 2.0], 1) + 1.0
        return self.end(F.avg_pool2d(y, 2).amax((2, 3)))


@pytest.mark.parametrize(
    ("weight", "activation"),
    [({}, {}), ({"bits": 4, "group_size": 2}, {}), ({"bits": 12}, {}), ({}, {"bits": 12})],
    ids=str,
)
def test_what_has_no_integer_kernel_runs_in_float(weight, activation):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    if "group_size" in weight:
        x = torch.randn(8, 4, 8, 8)
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    else:
        model = Odd()
    captured, _ = prepare(model, make_scheme(weight=weight, activation=activation), x[:2])
    calibrate(captured, x)
    fold(captured)
    run, simulated = IntegerRun(captured)(x), captured(x)
    torch.testing.assert_close(run, simulated, atol=0.02 * simulated.abs().max().item(), rtol=0)
    assert torch.equal(run, IntegerRun(convert(captured))(x))


def test_run_in_a_half_precision_region_is_exact():
    model, x = make("conv")
    captured, _ = folded(warm_up(model, x), make_scheme(4, 8), x)
    expected = IntegerRun(captured)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(IntegerRun(captured)(x), expected)


def test_constants_joined_to_codes_are_real_values():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            y = self.a(x)
            z = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1)
            return self.b(y).sum(1) + self.norm(z).sum(1)

    x = torch.randn(8, 3, 4)
    captured, _ = folded(Net(), make_scheme(8, 8), x)
    torch.testing.assert_close(IntegerRun(captured)(x), captured(x))


def test_casts_of_masks_are_done():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            mask = torch.zeros((x.shape[0], 4)).to(torch.bool)
            return self.b(self.a(x)).masked_fill(~mask, 0.0)

    x = torch.randn(8, 4)
    captured, _ = folded(Net(), make_scheme(8, 8), x)
    assert torch.equal(IntegerRun(captured)(x), torch.zeros(8, 4))

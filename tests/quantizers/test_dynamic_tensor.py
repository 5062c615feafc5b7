"""One grid for every batch: the numbers that onnxruntime's DynamicQuantizeLinear computes."""

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qat.codecs import DynamicTensorCodec, make_codec
from qat.errors import SpecError
from qat.functional.codes import quantize_dynamic
from qat.functional.dynamic import tensor_grid
from qat.quantizers import QUANTIZERS, DynamicTensor
from qat.spec import QuantSpec
from tests.quantizers.test_dynamic import calibrated_site

SPEC = QuantSpec(8, signed=False, symmetric=False)
TENSORS = {
    "both signs": torch.linspace(-1.7, 3.1, 5000),
    "positive": torch.linspace(0.3, 0.9, 700),
    "negative": torch.linspace(-8.0, -1e-3, 700),
    "zeros": torch.zeros(9),
    "one value": torch.tensor([-2.5]),
    "tiny": torch.linspace(-1.0, 1.0, 99) * 1e-30,
    "large": torch.linspace(-3.0, 1.0, 999) * 1e30,
    "symmetric": torch.linspace(-127.5, 127.5, 511),  # the zero point is a tie
}


@pytest.fixture(scope="module")
def operator():
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    kinds = {"y": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    results = [helper.make_tensor_value_info(k, v, None) for k, v in kinds.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph([node], "one", [x], results)
    opsets = [helper.make_opsetid("", 21)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return lambda x: [torch.as_tensor(y) for y in session.run(None, {"x": x.numpy()})]


def quantizer() -> DynamicTensor:
    return DynamicTensor(SPEC, (), has_batch=True)


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_operator_computes_what_the_runtime_computes(x, operator):
    for ours, theirs in zip(quantize_dynamic(x), operator(x), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs.view(ours.shape))


def test_runtime_agrees_on_random_tensors(operator):
    torch.manual_seed(0)
    for _ in range(300):
        x = torch.randn(257) * 10 ** torch.empty(1).uniform_(-5, 5) + torch.randn(1)
        for ours, theirs in zip(quantize_dynamic(x), operator(x), strict=True):
            assert torch.equal(ours, theirs.view(ours.shape))


@pytest.mark.parametrize("zero_point", [0, 1, 100, 254, 255])
def test_every_code_of_the_grid_comes_back(zero_point):
    codes = torch.arange(256.0)
    x = (codes - zero_point) * 2.0**-5
    assert torch.equal(quantizer().codes(x), codes)
    assert torch.equal(quantizer()(x), x)
    scale, offset = tensor_grid(x, 255)
    assert (scale.item(), offset.item()) == (2.0**-5, zero_point)


def test_error_is_half_a_step_and_at_the_ends_half_a_step_of_the_zero_point_more():
    x = torch.randn(4000)
    scale, _ = tensor_grid(x, 255)
    error = (quantizer()(x) - x).abs()
    assert error.max() <= scale * 1.00001
    inside = (x > x.min() + scale) & (x < x.max() - scale)
    assert error[inside].max() <= scale * 0.50001


def test_samples_share_the_grid():
    x = torch.randn(2, 8)
    assert not torch.equal(quantizer()(x)[0], quantizer()(torch.stack([x[0], 9 * x[1]]))[0])


def test_gradient_is_one_everywhere():
    x, weight = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    (quantizer()(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_nothing_is_learned_and_calibration_changes_no_value():
    quant, x = calibrated_site("dynamic_tensor", SPEC), 100 * torch.randn(4, 6)
    assert list(quant.parameters()) == []
    assert torch.equal(quant(x), quantizer()(x))
    assert not quant.is_static


def test_half_precision_keeps_its_type():
    assert quantizer()(torch.randn(3, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_codec_computes_the_same_bits():
    x, quant = torch.randn(4, 7, 6) + 0.3, calibrated_site("dynamic_tensor", SPEC)
    codec = make_codec(quant)
    assert isinstance(codec, DynamicTensorCodec)
    assert torch.equal(codec(x), quant(x))


@pytest.mark.parametrize(
    ("spec", "has_batch"),
    [(QuantSpec(8), True), (QuantSpec(4, signed=False, symmetric=False), True), (SPEC, False)],
    ids=["symmetric", "four bits", "weight"],
)
def test_formats_that_the_operator_does_not_have(spec, has_batch):
    with pytest.raises(SpecError, match="quantizer DynamicTensor on activations"):
        QUANTIZERS["dynamic_tensor"](spec, (), has_batch=has_batch)

"""Which kernels onnxruntime forms of two well-known networks, and what their files hold."""

from functools import cache

import onnx
import pytest
import torch
from onnx import TensorProto

from qat.models import build
from qat.spec import Rule
from tests.export.conftest import Exported, export
from tests.export.test_onnx import integer_weights, optimised_ops
from tests.helpers import make_scheme, smooth_images

SCHEMES = [(8, 8), (4, 8), (4, 4)]
CONVOLUTIONS = {"resnet18": 20, "mobilenet_v2": 52}
"""All of them: none stays float."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both networks at some widths, first and last layer in 8 bits, each exported once."""

    @cache
    def make(name: str, weight_bits: int, activation_bits: int) -> Exported:
        torch.manual_seed(0)
        rules = {"ends": Rule("@first|@last", {"bits": 8}, {"bits": 8})}
        scheme = make_scheme(weight_bits, activation_bits, rules=rules)
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        return export(build(name, 10), scheme, smooth_images(8), path)

    return make


@pytest.mark.parametrize("bits", SCHEMES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_runs_on_integers(exported, name, bits, tmp_path):
    ops = optimised_ops(exported(name, *bits).path, tmp_path)
    assert ops["QLinearConv"] == CONVOLUTIONS[name]
    assert {op for op in ops if "Conv" in op} == {"QLinearConv"}
    assert (ops["QGemm"], ops["QLinearGlobalAveragePool"]) == (1, 1)
    assert ops["Gemm"] + ops["MatMul"] == 0


@pytest.mark.parametrize("bits", SCHEMES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_initialisers_are_integers(exported, name, bits):
    graph = onnx.load(exported(name, *bits).path).graph
    weights = integer_weights(graph)
    assert len(weights) == CONVOLUTIONS[name] + 1
    assert {w.data_type for w in weights.values()} == {TensorProto.INT8}
    channels = max(w.dims[0] for w in weights.values())
    floats = [i for i in graph.initializer if i.data_type == TensorProto.FLOAT]
    assert all(len(i.dims) <= 1 and sum(i.dims) <= channels for i in floats)
    assert {i.name.rpartition("scale")[2] for i in floats} == {""}  # each is a scale

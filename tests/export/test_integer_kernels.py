"""Which kernels onnxruntime forms of two well-known networks, and what their files hold."""

from collections import Counter

import onnx
import pytest
import torch
from onnx import TensorProto

from qat.models import build
from qat.spec import Rule
from tests.export.conftest import export
from tests.export.test_onnx import integer_weights, optimised_ops
from tests.helpers import make_scheme, slow_but, smooth_images

SCHEMES = [(8, 8), *(pytest.param(b, marks=pytest.mark.slow) for b in ((4, 8), (4, 4)))]
CONVOLUTIONS = {"resnet18": 20, "mobilenet_v2": 52}
"""All of them: none stays float."""


@pytest.mark.parametrize("bits", SCHEMES)
@pytest.mark.parametrize("name", slow_but(CONVOLUTIONS, "mobilenet_v2"))
def test_every_convolution_runs_on_integers_which_the_file_stores(name, bits, tmp_path):
    torch.manual_seed(0)
    rules = {"ends": Rule("@first|@last", {"bits": 8}, {"bits": 8})}
    scheme = make_scheme(bits[0], bits[1], rules=rules)
    path = tmp_path / "model.onnx"
    export(build(name, 10), scheme, smooth_images(8), path)
    _check_kernels(optimised_ops(path, tmp_path), name)
    _check_initialisers(onnx.load(path).graph, name)


def _check_kernels(ops: Counter[str], name: str) -> None:
    assert ops["QLinearConv"] == CONVOLUTIONS[name]
    assert {op for op in ops if "Conv" in op} == {"QLinearConv"}
    assert (ops["QGemm"], ops["QLinearGlobalAveragePool"]) == (1, 1)
    assert ops["Gemm"] + ops["MatMul"] == 0


def _check_initialisers(graph: onnx.GraphProto, name: str) -> None:
    weights = integer_weights(graph)
    assert len(weights) == CONVOLUTIONS[name] + 1
    assert {w.data_type for w in weights.values()} == {TensorProto.INT8}
    channels = max(w.dims[0] for w in weights.values())
    floats = [i for i in graph.initializer if i.data_type == TensorProto.FLOAT]
    assert all(len(i.dims) <= 1 and sum(i.dims) <= channels for i in floats)
    assert {i.name.rpartition("scale")[2] for i in floats} == {""}  # each is a scale

"""Modules of torch as data in a packed file, and back."""

import json

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat.errors import ExportError
from qat.export.allowed import MODULES
from qat.export.module_form import build_module, describe_module, module_tensors

IMAGE, ROW, CUBE = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6), torch.randn(2, 4, 6, 6, 2)
STEPS, FEATURES = torch.randn(2, 5, 4), torch.randn(2, 4)
CASES = [
    (nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True), STEPS),
    (nn.LSTM(4, 3, proj_size=2), STEPS),
    (nn.GRU(4, 3, bias=False), STEPS),
    (nn.RNN(4, 3, nonlinearity="relu"), STEPS),
    (nn.RNNCell(4, 3, nonlinearity="relu"), FEATURES),
    (nn.LSTMCell(4, 3, bias=False), FEATURES),
    (nn.GRUCell(4, 3), FEATURES),
    (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), ROW),
    (nn.InstanceNorm2d(4, eps=0.1), IMAGE),
    (nn.InstanceNorm3d(4), CUBE),
    (nn.Unfold(2, padding=1, stride=2), IMAGE),
    (nn.Fold((6, 6), 2, stride=2), torch.randn(2, 8, 9)),
    (nn.Threshold(0.1, 0.7), IMAGE),
    (nn.Softshrink(0.3), IMAGE),
    (nn.Hardshrink(0.3), IMAGE),
    (nn.Tanhshrink(), IMAGE),
    (nn.LPPool1d(2, 2), ROW),
    (nn.LPPool2d(3, 2, stride=1, ceil_mode=True), IMAGE.abs()),
    (nn.LPPool3d(2, 2), CUBE),
    (nn.RReLU(0.1, 0.5), IMAGE),
    (nn.EmbeddingBag(7, 3, mode="max", padding_idx=1), torch.randint(0, 7, (2, 4))),
    (nn.Bilinear(4, 4, 3, bias=False), FEATURES),
    (nn.PairwiseDistance(3.0, keepdim=True), FEATURES),
    (nn.CosineSimilarity(0), FEATURES),
    (nn.LogSigmoid(), IMAGE),
    (nn.Softsign(), IMAGE),
    (nn.Softmin(1), IMAGE),
    (nn.Softmax2d(), IMAGE),
    (nn.ConstantPad3d(1, 0.5), CUBE),
    (nn.ReflectionPad1d(1), ROW),
    (nn.ReflectionPad3d(1), IMAGE),
    (nn.ReplicationPad1d(2), ROW),
    (nn.ReplicationPad3d(1), IMAGE),
    (nn.CircularPad1d(1), ROW),
    (nn.CircularPad2d(1), IMAGE),
    (nn.CircularPad3d(1), CUBE),
    (nn.FeatureAlphaDropout(), IMAGE),
    (nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    (nn.UpsamplingBilinear2d(size=(9, 9)), IMAGE),
]
TWO_INPUTS = (nn.Bilinear, nn.PairwiseDistance, nn.CosineSimilarity)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("module", "x"), CASES, ids=[str(m) for m, _ in CASES])
def test_module_comes_back_with_all_its_options(module, x):
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.0)
    form = json.loads(json.dumps(describe_module(module.eval())))
    tensors = {f"it.{key}": value for key, value in module_tensors(module).items()}
    again = build_module("it", form, tensors, {})
    inputs = (x, x.flip(0)) if isinstance(module, TWO_INPUTS) else (x,)
    with torch.no_grad():
        found, expected = (tree_leaves(m(*inputs)) for m in (again, module))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert type(again) is type(module) is MODULES[form["type"]]


@pytest.mark.parametrize("count", [0, -1, 1001, 2.0, True, "2"])
def test_recurrent_module_with_absurdly_many_layers_is_refused(count):
    form = describe_module(nn.LSTM(4, 3))
    form["options"]["num_layers"] = count
    with pytest.raises(ExportError, match="layers"):
        build_module("it", form, {}, {})

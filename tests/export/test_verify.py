from functools import partial

import numpy as np
import onnx
import pytest
import torch

from qat.errors import VerificationError
from qat.export.runtime import OnnxModel
from qat.export.verify import SiteDifference, Verification, compare_outputs, compare_sites
from qat.reference.run import IntegerRun


def tamper(path, target, change, *, layer="layer2.1.conv1"):
    """Write a copy of a file in which ``change`` was done to the codes of one layer's weight."""
    proto = onnx.load(path)
    (weight,) = [i for i in proto.graph.initializer if i.name == f"{layer}.weight_codes"]
    codes = onnx.numpy_helper.to_array(weight).copy()
    change(codes)
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    onnx.save(proto, target)
    return target


def flip_one(codes):
    index = np.unravel_index(np.abs(codes.astype(int)).argmax(), codes.shape)
    codes[index] = -codes[index]


def flip_all(codes):
    codes *= -1


@pytest.mark.parametrize(
    ("layer", "site"),
    [
        ("conv1", "relu"),
        ("layer2.1.conv1", "layer2.1.relu1"),
        ("layer2.1.conv2", "layer2.1.bn2"),
        ("layer3.2.conv2", "layer3.2.bn2"),
    ],
)
def test_one_flipped_code_is_found_where_it_is(exported_resnet20, tmp_path, layer, site):
    exported = exported_resnet20(2, 2)
    path = tamper(exported.path, tmp_path / "bad.onnx", flip_one, layer=layer)
    run = partial(IntegerRun, exported.model)
    found = compare_sites(run, path, exported.sites, exported.x[:16])
    first = Verification({}, {}, found).first_difference
    assert first is not None
    assert first.site == site
    whole = compare_sites(run, exported.path, exported.sites, exported.x[:16])
    assert Verification({}, {}, whole).first_difference is None


def test_a_tampered_file_does_not_pass(exported_resnet20, tmp_path):
    exported = exported_resnet20(2, 2)
    path = tamper(exported.path, tmp_path / "bad.onnx", flip_all)
    agreement, difference = compare_outputs(exported.logits, OnnxModel(path)(exported.x))
    sites = compare_sites(partial(IntegerRun, exported.model), path, exported.sites, exported.x[:8])
    check = Verification({"onnxruntime": agreement}, {"onnxruntime": difference}, sites)
    assert not check.passed
    with pytest.raises(VerificationError, match=r"onnxruntime.*site 'layer2\.1\.relu1'"):
        check.check()


def test_threshold():
    agreement = {"converted": 1.0, "onnxruntime": 0.99, "simulated": 0.9}
    check = Verification(agreement, {}, threshold=0.99)
    assert check.passed
    check.check()
    check.threshold = 0.9901
    assert not check.passed
    with pytest.raises(
        VerificationError, match=r"expected onnxruntime .*99\.01%.*got 99\.00%.*output only"
    ):
        check.check()


def test_first_difference_is_the_first_in_order():
    sites = [SiteDifference("a", 0.0, 0), SiteDifference("b", 1e-9, 1), SiteDifference("c", 0.5, 9)]
    assert Verification({}, {}, sites).first_difference == sites[1]
    assert Verification({}, {}, sites[:1]).first_difference is None


def test_outputs_by_hand():
    reference = torch.tensor([[0.0, 1.0], [0.5, 0.25], [0.0, -1.0], [0.3, 0.2]])
    other = reference.clone()
    other[1] = torch.tensor([0.5, 0.6])  # the prediction turns; largest difference 0.35
    agreement, difference = compare_outputs(reference, other)
    assert agreement == 0.75
    assert difference == pytest.approx(0.35 / 2 * 255)
    assert compare_outputs(reference, reference) == (1.0, 0.0)


def test_outputs_that_are_all_alike_divide_by_nothing():
    agreement, difference = compare_outputs(torch.zeros(2, 3), torch.zeros(2, 3))
    assert (agreement, difference) == (1.0, 0.0)


def test_outputs_that_are_not_finite_never_agree():
    bad = torch.full((2, 3), float("nan"))
    assert compare_outputs(bad, bad)[0] == 0.0

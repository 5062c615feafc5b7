from functools import partial

import numpy as np
import onnx
import pytest
import torch

from qat.errors import ExportError, VerificationError
from qat.export.agreement import OutputDifference, compare_outputs, compare_trees
from qat.export.onnx_file import write_onnx
from qat.export.runtime import OnnxModel
from qat.export.sites import check_sites, sources
from qat.export.verify import SiteDifference, Verification, compare_sites, save_first_difference
from qat.reference.run import IntegerRun


def tamper(path, target, change, *, layer="layer2.1.conv1"):
    """Write a copy of a file in which ``change`` was done to the codes of one layer's weight."""
    proto = onnx.load(path)
    (weight,) = [i for i in proto.graph.initializer if i.name == f"{layer}.weight_codes"]
    codes = onnx.numpy_helper.to_array(weight).copy()
    change(codes)
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    write_onnx(target, proto)
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


def test_what_the_first_differing_site_reads_is_kept(exported_resnet20, tmp_path):
    exported = exported_resnet20(2, 2)
    path = tamper(exported.path, tmp_path / "bad.onnx", flip_all)
    run, x = partial(IntegerRun, exported.model), exported.x[:4]
    compare = partial(compare_sites, run, path, exported.sites, x)
    site = "layer2.1.relu1"
    reads = sources(exported.model, site)
    assert reads == ["layer2.0.relu2"]
    save_first_difference(tmp_path / "first.npz", compare, site, reads)
    kept = np.load(tmp_path / "first.npz")
    assert set(kept.files) == {"codes:model", "codes:file", "reads:layer2.0.relu2"}
    share = (kept["codes:model"] != kept["codes:file"]).mean()
    assert share == next(s.share for s in compare() if s.site == site)
    whole = OnnxModel(exported.path, outputs=["layer2.0.relu2:codes"]).run(x)
    assert np.array_equal(kept["reads:layer2.0.relu2"], whole["layer2.0.relu2:codes"])


def test_sites_of_another_model_are_refused(exported_resnet20, tmp_path):
    exported = exported_resnet20(2, 2)
    assert check_sites(exported.path, exported.model) == exported.sites
    proto = onnx.load(exported.path)
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [n.replace("layer2.1.relu1:codes", "else:codes") for n in names]
    write_onnx(tmp_path / "other.onnx", proto)
    with pytest.raises(ExportError, match=r"got 2 that only one of the two has, first 'else'"):
        check_sites(tmp_path / "other.onnx", exported.model)


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_files_that_cannot_be_read_are_named(content, exported_resnet20, tmp_path):
    path = tmp_path / "bad.onnx"
    whole = exported_resnet20(2, 2).path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        check_sites(path, exported_resnet20(2, 2).model)


def test_a_packed_file_that_differs_does_not_pass():
    check = Verification({"onnxruntime": 1.0}, {}, packed_difference="conv.weight")
    assert not check.passed
    with pytest.raises(VerificationError, match=r"safetensors .* 'conv\.weight'"):
        check.check()


def test_a_file_whose_outputs_are_exchanged_does_not_pass():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    right = compare_trees("onnxruntime", {"a": a, "b": [b, None]}, {"a": a, "b": (b, None)})
    assert Verification({"onnxruntime": 1.0}, {}, outputs=right).passed
    wrong = compare_trees("onnxruntime", {"a": a, "b": [b]}, {"a": a, "c": (b,)})
    check = Verification({"onnxruntime": 1.0}, {}, outputs=wrong)
    assert not check.passed
    with pytest.raises(VerificationError, match=r"expected output 'b\.0' of onnxruntime .*0\.00%"):
        check.check()
    simulated = [OutputDifference("a", "simulated", 0.0, 9.0)]  # does not decide
    assert Verification({"onnxruntime": 1.0}, {}, outputs=simulated).passed

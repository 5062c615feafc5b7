"""An ``.onnx`` file is read only if it is as it was written and asks for nothing beside itself."""

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qat.errors import ExportError
from qat.export.onnx import export_onnx
from qat.export.onnx_file import read_onnx, write_onnx
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from tests.helpers import folded, make_scheme


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    path, x = tmp_path_factory.mktemp("onnx") / "m.onnx", torch.randn(8, 4)
    captured, _ = folded(nn.Sequential(nn.Linear(4, 3)), make_scheme(), x)
    export_onnx(convert(captured), x, path, metadata={"name": "tiny"})
    return path


@pytest.fixture
def model(exported):
    return onnx.load(exported)


def refusal(model, path, **options):
    write_onnx(path, model)
    with pytest.raises(ExportError) as error:
        OnnxModel(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_bit_can_turn_unnoticed(exported, tmp_path):
    content, path = exported.read_bytes(), tmp_path / "m.onnx"
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ExportError):
            read_onnx(path)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_file_that_is_cut_off_is_refused(exported, tmp_path, length):
    (tmp_path / "m.onnx").write_bytes(exported.read_bytes()[:length])
    with pytest.raises(ExportError, match=r"m\.onnx"):
        read_onnx(tmp_path / "m.onnx")


def test_a_block_of_zeros_is_noticed(exported, tmp_path):
    content = bytearray(exported.read_bytes())
    for start in range(0, len(content) - 64, 64):
        damaged = content[:start] + bytes(64) + content[start + 64 :]
        if damaged != content:
            (tmp_path / "m.onnx").write_bytes(damaged)
            with pytest.raises(ExportError):
                read_onnx(tmp_path / "m.onnx")


def test_the_checksum_is_no_metadata_of_the_exporter(exported):
    assert OnnxModel(exported).metadata == {"name": "tiny"}


def test_a_file_without_a_checksum_is_read_with_a_warning(model, tmp_path, caplog):
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    assert OnnxModel(tmp_path / "m.onnx")(torch.zeros(2, 4)).shape == (2, 3)
    assert "has no checksum" in caplog.text


def add_node(model, op, *inputs, domain="", **attributes):
    node = helper.make_node(op, [*inputs], [f"new_{op}"], domain=domain, **attributes)
    model.graph.node.insert(0, node)
    if domain:
        model.opset_import.add(domain=domain, version=1)


def add_tensor(model, name, values):
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))


def scale_of(model):
    names = {n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return next(t for t in model.graph.initializer if t.name in names)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_positive_number_is_refused(model, tmp_path, value):
    tensor = scale_of(model)
    values = np.full_like(numpy_helper.to_array(tensor), value)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert tensor.name in refusal(model, tmp_path / "m.onnx")


def test_operations_of_other_packages_are_refused(model, tmp_path):
    add_node(model, "Anything", "input", domain="com.somebody")
    assert "'com.somebody'" in refusal(model, tmp_path / "m.onnx")


def test_graphs_inside_of_operations_are_refused(model, tmp_path):
    inner = helper.make_graph([], "inner", [], [])
    add_tensor(model, "yes", [True])
    add_node(model, "If", "yes", then_branch=inner, else_branch=inner)
    assert "an operation If with a graph inside" in refusal(model, tmp_path / "m.onnx")


def test_functions_are_refused(model, tmp_path):
    relu = helper.make_node("Relu", ["a"], ["b"])
    function = helper.make_function("own", "F", ["a"], ["b"], [relu], model.opset_import)
    model.functions.append(function)
    assert "functions" in refusal(model, tmp_path / "m.onnx")


SIZES = {
    "zeros": ("ConstantOfShape", [[10**5, 10**6]], {}),
    "expanded": ("Expand", [np.float32(0), [10**5, 10**6]], {}),
    "tiled": ("Tile", [np.zeros((10, 10), np.float32), [10**4, 10**5]], {}),
    "padded": ("Pad", [np.zeros((1, 1), np.float32), [0, 0, 10**5, 10**6]], {}),
    "a range": ("Range", [0, 10**11, 1], {}),
    "classes": ("OneHot", [[0, 1], 10**11, np.float32([0, 1])], {}),
}


@pytest.mark.parametrize("name", SIZES)
def test_more_memory_than_is_free_is_refused_before_it_is_taken(model, tmp_path, name):
    op, inputs, attributes = SIZES[name]
    names = [f"size_{i}" for i in range(len(inputs))]
    for key, value in zip(names, inputs, strict=True):
        add_tensor(model, key, value)
    add_node(model, op, *names, **attributes)
    assert "GiB, more than is free" in refusal(model, tmp_path / "m.onnx")


def test_a_tensor_that_says_more_than_it_holds_is_refused(model, tmp_path):
    model.graph.initializer[0].dims[:] = [2**40]
    assert "bytes of a tensor" in refusal(model, tmp_path / "m.onnx")


def outside(model, location, **more):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.mark.parametrize(
    "kind", ["above", "absolute", "link", "missing", "short", "pipe", "folder"]
)
def test_no_other_file_is_read(model, tmp_path, kind):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1000))
    names = {"above": "../secret", "absolute": str(tmp_path / "secret"), "missing": "nothing"}
    outside(model, names.get(kind, "data"))
    if kind == "link":
        (folder / "data").symlink_to(tmp_path / "secret")
    elif kind == "short":
        (folder / "data").write_bytes(b"1")
    elif kind == "pipe":
        os.mkfifo(folder / "data")
    elif kind == "folder":
        (folder / "data").mkdir()
    assert "in another file" in refusal(model, folder / "m.onnx")


def test_what_other_exporters_put_beside_their_file_is_read(model, exported, tmp_path):
    del model.metadata_props[:]
    path, x = tmp_path / "foreign.onnx", torch.randn(3, 4)
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    assert (tmp_path / "data").stat().st_size > 0
    assert torch.equal(OnnxModel(path)(x), OnnxModel(exported)(x))

"""A packed file is a model by itself: the converted model's values and codes, from data alone."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from qat.errors import ExportError
from qat.export.packed import first_packed_difference, holds_graph, save_packed
from qat.graph.convert import convert
from qat.models import build
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from tests.graph.test_convert import FORMATS, NETS, make
from tests.helpers import folded, make_scheme, warm_up


class Functions(nn.Module):
    """What is written as functions, methods, constants and attributes of tensors."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        y = F.linear(x, self.weight) + self.shift
        mask = torch.ones(6, 6, dtype=torch.bool, device=y.device).triu(1)
        y = self.norm(F.pad(torch.relu(y)[..., None, 1:], (0, 1)).squeeze(1))
        scores = (y[:, :, None] * y[:, None, :]).masked_fill(mask, -float("inf"))
        return F.softmax(scores, -1).mean((1,)).flatten(1)


def images(size):
    return lambda: torch.randn(4, 3, size, size)


MODELS = {
    "resnet20": (lambda: build("resnet20", 10), images(32)),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), images(32)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), images(32)),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),
        images(32),
    ),
    "gpt": (lambda: build("gpt", 11, context=16), lambda: torch.randint(0, 11, (4, 16))),
    "functions": (Functions, lambda: torch.randn(16, 4)),
}


def convert_and_save(model, x, path, scheme=None):
    captured, _ = folded(warm_up(model, x), scheme or make_scheme(), x)
    converted = convert(captured)
    save_packed(converted, x, path, metadata={"name": "test"})
    return converted


def assert_same(converted, path, *batches):
    loaded = PackedModel(path)
    assert not any(p.requires_grad for p in loaded.parameters())
    for x in batches:
        assert torch.equal(loaded(x), IntegerRun(converted)(x))
        assert torch.equal(loaded.graph_module(x), converted(x))


@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name, tmp_path):
    torch.manual_seed(0)
    make_model, make_batch = MODELS[name]
    x, path = make_batch(), tmp_path / "m.safetensors"
    converted = convert_and_save(make_model(), x, path, make_scheme(4, 8))
    assert_same(converted, path, x, make_batch()[:3])


@pytest.mark.parametrize("net", NETS)
def test_every_layer(net, tmp_path):
    model, x = make(net)
    converted = convert_and_save(model, x, tmp_path / "m.safetensors")
    assert_same(converted, tmp_path / "m.safetensors", x)


@pytest.mark.parametrize("weight", [*FORMATS.values(), {"bits": 4, "group_size": 2}], ids=str)
def test_every_format(weight, tmp_path):
    model, x = make("conv")
    path = tmp_path / "m.safetensors"
    assert_same(convert_and_save(model, x, path, make_scheme(weight=weight)), path, x)


@pytest.mark.parametrize("activation", [{"bits": 12}, {"quantizer": "dynamic"}], ids=str)
def test_wide_and_dynamic_activations(activation, tmp_path):
    model, x = make("linear")
    path = tmp_path / "m.safetensors"
    assert_same(convert_and_save(model, x, path, make_scheme(activation=activation)), path, x)


def test_what_it_tells(tmp_path):
    model, x = make("conv")
    convert_and_save(model, x, tmp_path / "m.safetensors")
    loaded = PackedModel(tmp_path / "m.safetensors")
    assert loaded.metadata == {"name": "test"}
    assert loaded.input_shape == (4, 8, 8)
    assert loaded(x[:1]).shape == (1, 5)


def test_a_process_that_never_saw_the_model(tmp_path):
    torch.manual_seed(0)
    model, x = make("conv")
    convert_and_save(model, x, tmp_path / "m.safetensors")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, qat; x = torch.load('x.pt'); y = qat.PackedModel('m.safetensors')(x);"
        "torch.save(y, 'y.pt'); print([m for m in sys.modules if 'test' in m and 'qat' in m])"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert torch.equal(torch.load(tmp_path / "y.pt"), PackedModel(tmp_path / "m.safetensors")(x))


class Own(nn.Module):
    """A module that no list knows and whose code looks at values."""

    def forward(self, x):
        return x * 2 if bool(x.sum() > 0) else x


def test_an_operation_that_no_file_may_name(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(4, 4), Own(), nn.Linear(4, 3))
    path, x = tmp_path / "m.safetensors", torch.randn(16, 4)
    with caplog.at_level(logging.WARNING):
        converted = convert_and_save(model, x, path)
    for text in (caplog.text, refusal(path)):
        assert "a module of class" in text
        assert "Own at '1'" in text
        assert "use model.onnx" in text
    assert not holds_graph(path)
    assert first_packed_difference(converted, path) is None


def refusal(path):
    with pytest.raises(ExportError) as error:
        PackedModel(path)
    return str(error.value)


def edit(path, change):
    """Change the header of a file."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qat"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"qat": json.dumps(header)})


def node(position, value):
    def change(header, tensors):
        header["graph"]["nodes"][1][position] = value

    return change


def module(**entries):
    def change(header, tensors):
        next(iter(header["graph"]["modules"].values())).update(entries)

    return change


def getattr_of(name):
    def change(header, tensors):
        row = ["bad", "call_function", "builtins.getattr"]
        arguments = [{"node": header["graph"]["nodes"][0][0]}, name]
        header["graph"]["nodes"].insert(1, [*row, arguments, {}, None])

    return change


DAMAGE = {
    "function": ([node(1, "call_function"), node(2, "torch.load")], "call_function 'torch.load'"),
    "method": ([node(1, "call_method"), node(2, "apply_")], "call_method 'apply_'"),
    "kind": ([node(1, "exec")], "an operation exec"),
    "module": ([node(2, "nothing.here")], "call_module 'nothing.here'"),
    "name": ([node(0, "x; import os")], "a name 'x; import os'"),
    "keyword": ([node(4, {"a=1,b": 2})], "a name 'a=1,b'"),
    "argument": ([node(3, [{"code": "1"}])], "an argument {'code': '1'}"),
    "order": ([node(3, [{"node": "later"}])], "an argument {'node': 'later'}"),
    "attribute": ([getattr_of("__class__")], "an attribute ('__class__',)"),
    "class": ([module(type="Module")], "of type 'Module'"),
    "format": ([module(spec={"bits": 99})], "bits=99"),
    "tensor": ([lambda _, t: t.pop("3.bias_codes"), lambda _, t: t.pop("3.weight_scale")], "'3.w"),
    "shape": ([lambda h, _: h["weights"]["3"].update(shape=[1])], "is invalid"),
    "graph": ([lambda h, _: h.update(graph=None, no_graph=None)], "export it again"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_files(name, tmp_path):
    model, x = make("conv")
    path = tmp_path / "m.safetensors"
    convert_and_save(model, x, path)
    changes, message = DAMAGE[name]
    for change in changes:
        edit(path, change)
    text = refusal(path)
    assert "m.safetensors" in text
    assert message in text


def test_another_graph_is_a_difference(tmp_path):
    model, x = make("conv")
    path = tmp_path / "m.safetensors"
    converted = convert_and_save(model, x, path)
    edit(path, lambda header, _: header["graph"]["nodes"][-1].reverse())
    assert first_packed_difference(converted, path) == "graph"

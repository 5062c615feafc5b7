"""A packed file is a model by itself: the converted model's values and codes, from data alone."""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F

from qat.errors import ExportError
from qat.export.calls import checked_call
from qat.export.packed import first_packed_difference, holds_graph, load_packed, save_packed
from qat.export.packed_file import pack_file
from qat.export.packed_graph import PackedGraph
from qat.graph.convert import convert
from qat.models import build
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from tests.graph.test_convert import FORMATS, NETS, make
from tests.helpers import folded, make_scheme, slow_but, warm_up


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a small file of ours, the model in it, and a batch."""
    torch.manual_seed(0)
    path, (model, x) = tmp_path_factory.mktemp("saved") / "m.safetensors", make("conv")
    converted = convert_and_save(model, x, path)
    return path.read_bytes(), converted, x


@pytest.fixture
def small(saved, tmp_path):
    """A copy of that file to change, the model, and the batch."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved[0])
    return path, *saved[1:]


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


@pytest.mark.parametrize("name", slow_but(MODELS, "resnet20", "vit", "gpt", "functions"))
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


def edit(path, *changes):
    """Change a file as its author could: the checksum is right again."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qat"])
    tensors = load_file(path)
    for change in changes:
        change(header, tensors)
    path.write_bytes(pack_file(tensors, header))


def node(position, value):
    def change(header, tensors):
        header["graph"]["nodes"][1][position] = value

    return change


def module(**entries):
    def change(header, tensors):
        next(iter(header["graph"]["modules"].values())).update(entries)

    return change


def option(name, value):
    def change(header, tensors):
        modules = header["graph"]["modules"].values()
        next(m for m in modules if m["type"] == "Conv2d")["options"][name] = value

    return change


def insert(op, target, *args, **kwargs):
    """Put a node behind the input, whose value the next one reads."""

    def change(header, tensors):
        nodes = header["graph"]["nodes"]
        arguments = [{"node": nodes[0][0]} if a is X else a for a in args]
        nodes.insert(1, ["bad", op, target, arguments, kwargs, None])

    return change


def call(target, *args, **kwargs):
    return insert("call_function", target, *args, **kwargs)


def scale_of_input(tensors):
    return next(value for name, value in tensors.items() if name.endswith(".scale"))


X = object()  # the input, among the arguments of a node
DAMAGE = {
    "function": ([node(1, "call_function"), node(2, "torch.load")], "call_function 'torch.load'"),
    "method": ([node(1, "call_method"), node(2, "apply_")], "call_method 'apply_'"),
    "kind": ([node(1, "exec")], "an operation exec"),
    "module": ([node(2, "nothing.here")], "call_module 'nothing.here'"),
    "name": ([node(0, "x; import os")], "a name 'x; import os'"),
    "twice": ([lambda h, _: h["graph"]["nodes"].insert(1, h["graph"]["nodes"][1])], "two nodes"),
    "no end": ([lambda h, _: h["graph"]["nodes"].pop()], "another end than one output"),
    "keyword": ([node(4, {"a=1,b": 2})], "a name 'a=1,b'"),
    "argument": ([node(3, [{"code": "1"}])], "an argument {'code': '1'}"),
    "text": ([node(3, ["'); import os; ('"])], "an argument "),
    "number": ([node(3, [10**40])], "an argument 1000"),
    "order": ([node(3, [{"node": "later"}])], "an argument {'node': 'later'}"),
    "attribute": ([call("builtins.getattr", X, "__class__")], "an attribute ('__class__',)"),
    "class": ([module(type="Module")], "of type 'Module'"),
    "option": ([option("device", "cpu")], "an option 'device'"),
    "private option": ([option("_weight", None)], "an option '_weight'"),
    "format": ([module(spec={"bits": 99})], "bits=99"),
    "codes": ([module(qmin=-1)], "codes (-1, 255)"),
    "tensor": ([lambda _, t: t.pop("3.bias_codes"), lambda _, t: t.pop("3.weight_scale")], "'3.w"),
    "shape": ([lambda h, _: h["weights"]["3"].update(shape=[1])], "bytes for 8 bits and shape (1,"),
    "huge": ([lambda h, _: h["weights"]["3"].update(shape=[2**50])], "bytes for 8 bits"),
    "bits": ([lambda h, _: h["weights"]["3"].update(bits=3.0)], "bytes for 3.0 bits"),
    "axis": ([lambda h, _: h["weights"]["3"].update(axis="0")], "an axis or block '0'"),
    "NaN scale": ([lambda _, t: t["3.weight_scale"].fill_(math.nan)], "'3.weight_scale'"),
    "infinite scale": ([lambda _, t: t["3.weight_scale"].fill_(math.inf)], "'3.weight_scale'"),
    "negative scale": ([lambda _, t: t["3.weight_scale"].neg_()], "'3.weight_scale'"),
    "no scale": ([lambda _, t: scale_of_input(t).zero_()], "a scale 0.0 at site"),
    "zero point": ([lambda _, t: t["3.weight_zero_point"].fill_(300)], "another grid of the wei"),
    "whole scale": ([lambda _, t: t.update({"3.weight_scale": t["3.weight_scale"].int()})], "grid"),
    "graph": ([lambda h, _: h.update(graph=None, no_graph=None)], "export it again"),
    "header": ([lambda h, _: h["graph"].clear()], "KeyError"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_files(name, small):
    path, *_ = small
    changes, message = DAMAGE[name]
    edit(path, *changes)
    text = refusal(path)
    assert "m.safetensors" in text
    assert message in text


METHODS_OF_A_GRAPH = sorted(
    {name for kind in (PackedGraph, fx.GraphModule, nn.ModuleList, dict) for name in dir(kind)}
)


def test_no_name_of_a_file_reaches_a_method_or_an_attribute(small):
    """A module may be called like anything: what runs is the module, with its own arguments."""
    path, converted, x = small

    def rename(header, tensors):
        nodes = header["graph"]["nodes"]
        for i, name in enumerate(METHODS_OF_A_GRAPH):
            header["graph"]["modules"][name] = {"type": "Identity", "options": {}}
            source = {"node": nodes[i][0]} if i else {"node": nodes[0][0]}
            nodes.insert(1 + i, [f"e{i}", "call_module", name, [source], {}, None])

    edit(path, rename)
    loaded = PackedModel(path)
    assert torch.equal(loaded(x), IntegerRun(converted)(x))
    assert torch.equal(loaded.graph_module(x), converted(x))
    names = {*METHODS_OF_A_GRAPH} - {"code", "forward", "graph"}
    assert not any(f".{name}(" in loaded.graph_module.code for name in names)


def test_a_method_of_the_graph_is_not_called_and_writes_nothing(small, tmp_path):
    path, *_ = small

    def call_to_folder(header, tensors):
        header["graph"]["modules"]["to_folder"] = {"type": "ReLU", "options": {}}
        row = ["e", "call_module", "to_folder", [str(tmp_path / "out"), "Name"], {}, None]
        header["graph"]["nodes"].insert(1, row)

    edit(path, call_to_folder)
    assert "an argument" in refusal(path)  # a path is no text that an operation takes
    assert not (tmp_path / "out").exists()


GIANT = 10**7
CALLS = {
    "a text repeated": (call("operator.mul", "a", 10**10), "mul of str and int"),
    "a list repeated": (call("operator.mul", [0], 10**10), "list and int"),
    "a text formatted": (call("operator.mod", "s", 1), "mod of str and int"),
    "a power": (call("operator.pow", 10, 10**9), "pow of int and int"),
    "a number": (call("operator.mul", 2**62, 2**62), "mul of int and int"),
    "a list changed": (call("operator.setitem", [0], 0, 1), "setitem of "),
    "a method of a text": (insert("call_method", "split", "a b"), "a method split of str"),
    "an attribute of a text": (call("builtins.getattr", "a", "T"), "an attribute of str"),
    "out": (call("torch.add", X, 1, out={"node": "x"}), "an argument out of add"),
    "zeros": (call("torch.zeros", [GIANT, GIANT]), "GiB at 'bad'"),
    "ones": (call("torch.ones", GIANT, GIANT), "GiB at 'bad'"),
    "full": (call("torch.full", [GIANT, GIANT], 1.0), "GiB at 'bad'"),
    "arange": (call("torch.arange", 2**50), "GiB at 'bad'"),
    "tiled": (call("torch.tile", X, [GIANT, GIANT]), "GiB at 'bad'"),
    "padded": (call("functional.pad", X, [GIANT, GIANT, GIANT, GIANT]), "GiB at 'bad'"),
    "resized": (call("functional.interpolate", X, [GIANT, GIANT]), "GiB at 'bad'"),
    "as classes": (call("functional.one_hot", X, 2**50), "got "),
    "a method": (insert("call_method", "new_zeros", X, [GIANT, GIANT]), "GiB at 'bad'"),
    "repeated": (insert("call_method", "repeat", X, GIANT, GIANT, 1, 1), "GiB at 'bad'"),
    "as many as a value says": (call("torch.repeat_interleave", X, X), "got "),
    "a view of more than there is": (
        insert("call_method", "expand", X, GIANT, -1, -1, -1, -1),
        "GiB",
    ),
    "chunks": (call("torch.chunk", X, GIANT), "chunk into 10,000,000 parts"),
    "dropout": (call("functional.dropout", X, 0.5, True), "dropout with random results"),
    "attention with dropout": (
        call("functional.scaled_dot_product_attention", X, X, X, None, 0.5),
        "with random results",
    ),
    "a wrong axis": (call("torch.cat", [X, X], 9), "got "),
    "nothing": (call("torch.cat", []), "got "),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_would_be_more_than_arithmetic_or_take_all_memory(name, small):
    path, _, x = small
    change, message = CALLS[name]
    if name in ("nothing", "a wrong axis", "out"):
        change = relisted(change)
    edit(path, change)
    loaded = PackedModel(path)
    with pytest.raises(ExportError) as error:
        loaded(x)
    assert "m.safetensors" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [["unbind"], ["split", 1], ["split", 100], ["tensor_split", 9999]])
def test_no_tensor_is_cut_into_more_parts_than_a_model_uses(cut, small):
    path, _, x = small

    def change(header, tensors):
        rows = header["graph"]["nodes"]
        rows.insert(1, ["big", "call_function", "torch.zeros", [10**6], {}, None])
        name, *more = cut
        rows.insert(
            2, ["cut", "call_function", f"torch.{name}", [{"node": "big"}, *more], {}, None]
        )

    edit(path, change)
    with pytest.raises(ExportError, match=rf"{cut[0]} into [\d,]+ parts"):
        PackedModel(path)(x)


WIDE = torch.zeros(3, 10_000)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "parts"),
    [
        (torch.unbind, [WIDE], {}, 3),
        (torch.unbind, [WIDE, 0], {}, 3),
        (torch.split, [WIDE, [4000, 6000], 1], {}, 2),
        (torch.split, [WIDE, [4000, 6000]], {"dim": -1}, 2),
        (torch.split, [WIDE, 1], {}, 3),
        (torch.split, [WIDE, 5000], {"dim": 1}, 2),
        (torch.chunk, [WIDE, 2, 1], {}, 2),
        (torch.tensor_split, [WIDE, [9000]], {"dim": 1}, 2),
    ],
)
def test_wide_tensors_are_cut_as_models_cut_them(target, args, kwargs, parts):
    assert len(checked_call(target, args, kwargs)) == parts


def relisted(change):
    """Name the input also where it stands inside a list or among the named arguments."""

    def changed(header, tensors):
        change(header, tensors)
        row, first = header["graph"]["nodes"][1], {"node": header["graph"]["nodes"][0][0]}
        row[3] = [[first if v is X else v for v in a] if isinstance(a, list) else a for a in row[3]]
        row[4] = dict.fromkeys(row[4], first)

    return changed


def test_what_is_predicted_from_cannot_be_changed_either(small):
    path, converted, x = small
    edit(path, insert("call_method", "add_", X, 1))
    before, loaded = x.clone(), PackedModel(path)
    assert torch.equal(loaded(x), loaded(x))
    assert torch.equal(loaded.packed(x), loaded.packed(x))
    assert torch.equal(x, before)
    assert torch.equal(loaded(x), IntegerRun(converted)(x + 1))


def test_weights_cannot_be_changed_by_running(small):
    path, _, x = small

    def add_to_a_weight(header, tensors):
        nodes = header["graph"]["nodes"]
        tensors["extra"] = torch.zeros(3)
        nodes.insert(1, ["c", "get_attr", "extra", [], {}, None])
        nodes.insert(2, ["d", "call_method", "add_", [{"node": "c"}, 1], {}, None])

    edit(path, add_to_a_weight)
    with pytest.raises(ExportError, match="changes the weights"):
        PackedModel(path)(x)


def test_no_bit_of_a_file_can_turn_unnoticed(tmp_path):
    """A bit of every third byte: refused, or the very same tensors and header."""
    model, x = make("linear")
    path = tmp_path / "m.safetensors"
    convert_and_save(model, x, path)
    whole, content = load_packed(path), path.read_bytes()
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, header = load_packed(path)
        except ExportError:
            continue
        assert header == whole[1]
        assert tensors.keys() == whole[0].keys()
        assert all(torch.equal(tensors[key], whole[0][key]) for key in tensors)


def test_a_file_from_before_there_were_checksums_is_read_with_a_warning(tmp_path, caplog):
    model, x = make("linear")
    path = tmp_path / "m.safetensors"
    converted = convert_and_save(model, x, path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qat"])
    del header["sha256"], header["format"]
    save_file(load_file(path), path, metadata={"qat": json.dumps(header)})
    assert torch.equal(PackedModel(path)(x), IntegerRun(converted)(x))
    assert "has no checksum" in caplog.text


def test_a_batch_that_would_not_fit_is_refused_before_it_runs(small, monkeypatch):
    path, _, x = small
    loaded = PackedModel(path)
    monkeypatch.setattr("qat.export.memory_run.available", lambda: 10**6)
    assert loaded(x[:1]).shape == (1, 5)
    with pytest.raises(ExportError, match="GiB at"):
        loaded(x.repeat(50, 1, 1, 1))


def test_another_graph_is_a_difference(tmp_path):
    model, x = make("conv")
    path = tmp_path / "m.safetensors"
    converted = convert_and_save(model, x, path)
    edit(path, lambda header, _: header["graph"]["nodes"][-1].reverse())
    assert first_packed_difference(converted, path) == "graph"

"""Calls, the trees that models take and return, and which output is the prediction."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from qat.calls import Call
from qat.errors import ConfigError, ExportError, GraphError
from qat.export.form import describe_call, read_call
from qat.graph.trace import capture
from qat.outputs import Outputs, choose_prediction, find_prediction, named_tensors
from qat.signature import Signature
from qat.trees import build, leaves

A, B = torch.randn(3, 2), torch.randn(3, 5)
Pair = namedtuple("Pair", "left right")


@dataclass
class Named:
    """A tree that PyTorch does not know."""

    logits: Any
    rest: Any


@dataclass
class Made:
    """One that cannot be built of its fields."""

    x: Any = field(init=False)


@pytest.mark.parametrize(
    ("tree", "names", "rebuilt"),
    [
        (A, ["output"], A),
        ((A, [B]), ["output.0", "output.1.0"], (A, (B,))),
        ({"a": A, "b": {"0": B}}, ["a", "b.0"], {"a": A, "b": {"0": B}}),
        (OrderedDict(b=B, a=None), ["b"], {"b": B, "a": None}),
        (Pair(A, B), ["left", "right"], {"left": A, "right": B}),
        (Named(A, (2, B)), ["logits", "rest.1"], {"logits": A, "rest": (2, B)}),
    ],
)
def test_leaves_have_names_and_make_a_tree_again(tree, names, rebuilt):
    assert list(named_tensors(tree)) == names
    built = build(dict(leaves(tree)))
    assert built is rebuilt or built == rebuilt  # the very same tensors


def test_a_call_of_any_batch():
    both = [Call.of((A, B)), Call.of({"a": A, "b": B}), Call.of(OrderedDict(a=A, b=B))]
    assert [len(call.tensors) for call in both] == [2, 2, 2]
    assert Call.of(A).args == (A,)
    table = Call.of({"table": torch.zeros(7, 2), "x": A, "pair": (B, None), "scale": 2.0})
    taken = table.take(2)
    assert [len(x) for x in taken.tensors] == [7, 2, 2]
    assert taken.kwargs["pair"][1] is None
    seen = Call.of(A).on_copies(lambda x: x.zero_())
    assert seen.abs().sum() == 0 < A.abs().sum()


class Model(nn.Module):
    """Takes what it likes."""

    def forward(self, x, pair=None, *more, flag=True, **others):
        return x * 2


SIGNATURE = Signature.of(Model(), Call((A, (B, None)), {"flag": False, "z": B}))


@pytest.mark.parametrize(
    "call",
    [
        Call((A, (B,)), {"flag": False, "z": B}),
        Call((A,), {"z": B, "flag": False, "pair": [B], "y": None}),
        Call((), {"pair": (B, None), "flag": False, "z": B, "x": A}),
        Call(({"x": A, "pair": (B,), "flag": False, "z": B},), {}),  # as a batch
    ],
)
def test_one_signature_takes_a_call_in_all_its_forms(call):
    found = SIGNATURE.flatten(call.args, call.kwargs)
    assert all(x is y for x, y in zip(found, (A, B, B), strict=True))


@pytest.mark.parametrize(
    "call",
    [
        Call((A,), {"flag": False, "z": B}),
        Call((A, (B, B)), {"flag": False, "z": B}),
        Call((A, (B,)), {"flag": True, "z": B}),
        Call((A, (B,)), {"z": B}),
        Call((A, (B,)), {"flag": False, "z": 1.0}),
        Call((A, (B,), A), {"flag": False, "z": B}),
        Call((A, (B,)), {"flag": False, "z": B, "w": B}),
        Call(("text", (B,)), {"flag": False, "z": B}),
        Call(((A, (B, None)),), {"flag": False, "z": B}),  # a batch stands alone
    ],
)
def test_calls_of_another_form_are_refused(call):
    with pytest.raises(GraphError, match=r"expected a call like the captured one, x \(N, 2\)"):
        SIGNATURE.flatten(call.args, call.kwargs)


def test_the_form_in_a_file_is_read_back_or_refused():
    model = nn.Module()
    outputs = Outputs.of({"logits": A, "rest": (B, None, 3)})
    model.meta = {"signature": SIGNATURE, "outputs": outputs}
    form = describe_call(model)
    read = read_call(form)
    assert form is not None
    assert read is not None
    assert (read[0].inputs, read[0].constants) == (SIGNATURE.inputs, SIGNATURE.constants)
    assert read[1].build_of_tensors([A, B]) == {"logits": A, "rest": (B, None, 3)}
    for key, wrong in (
        ("inputs", []),
        ("inputs", form["inputs"] * 2),
        ("inputs", [{**form["inputs"][0], "dtype": "object"}]),
        ("parameters", [3]),
        ("constants", [[["flag"], [1]]]),
        ("outputs", [*form["outputs"], {"path": ["logits", 0], "value": 1}]),
        ("outputs", [{"path": [-1], "value": 1}]),
        ("prediction", "nothing"),
    ):
        with pytest.raises(ExportError):
            read_call({**form, key: wrong})


CLASSES = 5
LOGITS, FEATURES = torch.randn(3, CLASSES), torch.randn(3, 8)


@pytest.mark.parametrize(
    ("output", "wanted", "name"),
    [
        (LOGITS, None, None),
        (LOGITS, "logits", None),  # a tensor alone is the prediction, whatever the name
        ((LOGITS, FEATURES), None, "output.0"),
        ((FEATURES, LOGITS), None, "output.1"),
        ((FEATURES, LOGITS), 1, "output.1"),
        ((LOGITS, LOGITS * 2), "1", "output.1"),
        ({"aux": LOGITS, "logits": LOGITS * 2}, None, "logits"),
        ({"aux": LOGITS, "logits": LOGITS * 2}, "aux", "aux"),
        ({"logits": FEATURES[:, :2], "aux": LOGITS}, None, "aux"),
        ({"heads": [FEATURES, (LOGITS, None)]}, None, "heads.1.0"),
        (Named(LOGITS, {"x": 3}), None, "logits"),
        ({"wide": FEATURES}, None, "wide"),  # more outputs than classes
        ({"mask": LOGITS > 0, "y": LOGITS}, None, "y"),
    ],
)
def test_the_prediction_is_chosen_by_name_shape_or_place(output, wanted, name):
    outputs = Outputs.of(output)
    assert choose_prediction({"train": outputs, "eval": outputs}, wanted, CLASSES) == name
    found = find_prediction(output, name)
    assert found is next(x for n, x in named_tensors(output).items() if name in (None, n))


@pytest.mark.parametrize(
    ("output", "wanted", "shown"),
    [
        (FEATURES[:, :2], None, r"got output \(3, 2\)"),
        ((FEATURES, FEATURES), None, r"got output.0 \(3, 8\), output.1 \(3, 8\)"),
        ((FEATURES[:, :2], LOGITS), 0, r"prediction=0, got output.0 \(3, 2\), output.1 \(3, 5\)"),
        ({"y": LOGITS, "x": FEATURES}, "x", r"prediction=x, got y \(3, 5\), x \(3, 8\)"),
        ({"logits": LOGITS, "x": FEATURES}, "loigts", r"prediction=loigts, got logits \(3, 5\), x"),
        (LOGITS, "aux", r"prediction=aux, got output \(3, 5\)"),
        ({"n": 3}, None, "got no tensor"),
        ({"best": LOGITS > 0, "mean": LOGITS.mean(1)}, None, r"got best \(3, 5\), mean \(3\)"),
    ],
)
def test_a_wrong_guess_is_refused_with_the_outputs_and_their_shapes(output, wanted, shown):
    with pytest.raises(ConfigError, match=rf"expected logits of shape \(N, 5\).*{shown}"):
        choose_prediction({"eval": Outputs.of(output)}, wanted, CLASSES)


def test_both_modes_have_their_prediction_under_one_name():
    modes = {"train": Outputs.of({"logits": LOGITS, "aux": LOGITS}), "eval": Outputs.of(LOGITS)}
    assert choose_prediction(modes, None, CLASSES) == "logits"
    modes["eval"] = Outputs.of({"scores": LOGITS, "x": FEATURES})
    with pytest.raises(ConfigError, match="under one name in both modes"):
        choose_prediction(modes, None, CLASSES)


class Opaque(nn.Module):
    """Returns what no graph can."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return {"x": x * 2, "cache": self.value}


@pytest.mark.parametrize("value", [object(), Made(), {1, 2}])
def test_outputs_that_are_no_trees_of_tensors_are_refused_by_name(value):
    with pytest.raises(GraphError, match=rf"got {type(value).__name__} at 'cache'"):
        capture(Opaque(value), A)


class Table(nn.Module):
    """Multiplies by a table that has no batch and comes first."""

    def forward(self, table, x):
        return torch.relu(x @ table), x.mean(0)


def test_an_input_without_a_batch_is_found_by_what_the_model_does_with_it():
    captured = capture(Table(), (torch.randn(4, 4), torch.randn(2, 4)))
    assert captured.follows_batch
    assert [x.has_batch for x in captured.signature.inputs] == [False, True]
    assert [x.has_batch for x in captured.outputs["eval"].leaves] == [True, False]
    assert captured(torch.randn(4, 4), torch.randn(9, 4))[0].shape == (9, 4)


def test_an_argument_that_is_a_mapping_is_explained():
    class One(nn.Module):
        def forward(self, batch):
            return batch["a"] * 2

    with pytest.raises(GraphError, match=r"one argument as \(argument,\)"):
        capture(One(), {"a": A})
    assert torch.equal(capture(One(), ({"a": A},))({"a": A}), A * 2)

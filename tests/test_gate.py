"""What the gate says of a packed file: the first tensor, or the first output, that differs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qat import gate

A, B = torch.arange(3.0), torch.ones(2)
OURS = {"a": A, "b": B}


@pytest.mark.parametrize(
    ("stored", "has_graph", "theirs", "chosen", "expected"),
    [
        (None, True, {"a": A, "b": B}, None, None),
        ("conv.weight", True, {"a": A, "b": B}, None, "conv.weight"),
        ("conv.weight", False, None, None, "conv.weight"),
        (None, False, None, None, None),  # there is nothing that could run
        (None, True, {"a": A + 1, "b": B}, None, "a"),
        (None, True, {"a": A, "b": B + 1}, "a", "b"),
        (None, True, {"a": A, "b": B + 1}, "b", "predictions"),
        (None, True, {"b": B}, None, "a"),
    ],
)
def test_the_first_difference_of_a_packed_file(
    stored, has_graph, theirs, chosen, expected, monkeypatch
):
    signature = SimpleNamespace(prediction=chosen)
    parts = {
        "first_packed_difference": lambda model, path: stored,
        "holds_graph": lambda path: has_graph,
        "interface": lambda model: (signature, None),
        "PackedModel": lambda path: theirs,
        "IntegerRun": lambda model: OURS,
    }
    for name, part in parts.items():
        monkeypatch.setattr(gate, name, part)
    sample: Any = SimpleNamespace(on=lambda outputs: outputs)  # what a form returns, as it is
    assert gate._packed_difference(Any, Path("model.safetensors"), sample) == expected


def test_the_only_output_is_called_predictions(monkeypatch):
    monkeypatch.setattr(gate, "first_packed_difference", lambda model, path: None)
    monkeypatch.setattr(gate, "holds_graph", lambda path: True)
    monkeypatch.setattr(gate, "interface", lambda model: (None, None))
    monkeypatch.setattr(gate, "PackedModel", lambda path: A + 1)
    monkeypatch.setattr(gate, "IntegerRun", lambda model: A)
    sample: Any = SimpleNamespace(on=lambda outputs: outputs)
    assert gate._packed_difference(Any, Path("model.safetensors"), sample) == "predictions"

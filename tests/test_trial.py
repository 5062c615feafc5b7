"""The trial export: what has no form is named before training, and nothing else changes."""

import logging
import random

import pytest
import torch
from torch import nn

from qat.errors import ExportError
from qat.fake_quant import FakeQuant, Phase
from qat.graph.insert import prepare
from qat.trial import try_export
from tests.helpers import make_scheme


class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x @ x.mT + torch.eye(2))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.inverse = nn.Linear(4, 4), Inverse()

    def forward(self, x):
        return self.inverse(self.fc(x).unflatten(1, (2, 2))).flatten(1)


def prepared(model, x):
    return prepare(model.eval(), make_scheme(), x)[0]


def refused(model):
    with pytest.raises(ExportError, match="to have an ONNX form") as caught:
        try_export(prepared(model, torch.randn(2, 4)))
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_operation_without_an_onnx_form_is_named_with_its_line():
    sentence = refused(Unknown())
    assert "none for linalg_inv_ex at 'linalg_inv' in" in sentence
    assert "test_trial.py:" in sentence
    assert "(return torch.linalg.inv(x @ x.mT + torch.eye(2)))" in sentence


def test_module_without_an_onnx_form_is_named():
    pool = nn.FractionalMaxPool2d(2, 1)
    sentence = refused(nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), pool))
    assert "none for fractional_max_pool2d at '2'" in sentence


def test_operation_that_no_packed_file_may_name_is_a_warning_with_its_line(caplog):
    class Lerp(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return torch.lerp(self.fc(x), x, 0.5)

    with caplog.at_level(logging.WARNING, "qat"):
        try_export(prepared(Lerp(), torch.randn(2, 4)))
    assert "will hold no graph" in caplog.text
    assert "test_trial.py:" in caplog.text
    assert "return torch.lerp(self.fc(x), x, 0.5)" in caplog.text


def test_nothing_of_the_model_or_of_random_numbers_changes():
    x = torch.randn(2, 4)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)
    )
    captured = prepared(model, x).train()
    hook = captured.register_forward_hook(lambda *_: None)
    before = {k: v.clone() for k, v in captured.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    modes = [m.training for m in captured.modules()]
    phases = {m.site: m.phase for m in captured.modules() if isinstance(m, FakeQuant)}
    try_export(captured)
    assert set(phases.values()) == {Phase.FLOAT}
    assert all(torch.equal(v, captured.state_dict()[k]) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert [m.training for m in captured.modules()] == modes
    assert [*captured._forward_hooks] == [hook.id]
    assert phases == {m.site: m.phase for m in captured.modules() if isinstance(m, FakeQuant)}

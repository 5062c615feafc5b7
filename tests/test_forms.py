"""Every form of a model in one pass over an evaluation set, some of them on a part of it."""

import logging

import pytest
import torch
from torch import nn

from qat import forms
from qat.calls import Call
from qat.forms import predict_all
from qat.signature import Signature


def batches(samples, size, positions=0):
    """Return numbered samples; a label is the number of its prediction."""
    x = torch.arange(samples).float().view(-1, 1)
    y = torch.arange(samples * max(positions, 1)).view(samples, *[positions] * (positions > 0))
    return list(zip(x.split(size), y.split(size), strict=True))


def one_logit(x):
    return torch.cat([x, -x], 1)


SIGNATURE = Signature.of(nn.Identity(), Call.of(torch.zeros(4, 1)))


@pytest.mark.parametrize("samples", [1, 5, 12, 13, 40])
@pytest.mark.parametrize("size", [1, 4, 7, 40])
@pytest.mark.parametrize("wanted", [1, 3, 8, 100, None])
@pytest.mark.parametrize("piece", [None, 4])
def test_a_part_is_spread_evenly_over_the_set(samples, size, wanted, piece, monkeypatch):
    monkeypatch.setattr(forms, "LEAST_SAMPLES", 3)
    data, sizes = batches(samples, size), []

    def run(x):
        sizes.append(len(x))
        return one_logit(x)

    found = predict_all({"a": run, "b": one_logit}, SIGNATURE, data, ["b"], wanted, piece)
    assert max(sizes) == min(size, samples, 3 if piece else 40)
    assert found["a"].rows.tolist() == found["a"].labels.tolist() == list(range(samples))
    rows = found["b"].rows
    assert torch.equal(found["b"].logits, found["a"].logits[rows])
    assert torch.equal(found["b"].labels, rows)
    step = 1 if wanted is None else max(1, len(data) * len(data[0][1]) // wanted)
    assert rows.tolist() == list(range(0, samples, step))
    if wanted is not None:
        assert len(rows) >= min(wanted, samples) - step  # the last batch may be a short one


def test_positions_of_a_sample_are_taken_together():
    def run(x):
        return torch.stack([one_logit(x), one_logit(x + 0.25), one_logit(x + 0.5)], 1)

    found = predict_all({"a": run, "b": run}, SIGNATURE, batches(6, 2, 3), ["b"], 2)
    assert found["b"].rows.tolist() == [0, 1, 2, 9, 10, 11]
    assert found["b"].labels.tolist() == found["b"].rows.tolist()
    assert found["b"].logits[:, 0].tolist() == [0, 0.25, 0.5, 3, 3.25, 3.5]


def test_a_set_of_unknown_length_is_run_on_as_a_whole():
    found = predict_all({"a": one_logit}, SIGNATURE, iter(batches(9, 2)), ["a"], 1)
    assert found["a"].rows.tolist() == list(range(9))


def test_progress_is_told(monkeypatch, caplog):
    monkeypatch.setattr(forms, "SECONDS", -1.0)
    with caplog.at_level(logging.INFO, "qat"):
        predict_all({"a": one_logit}, SIGNATURE, batches(10, 5))
        predict_all({"a": one_logit}, SIGNATURE, iter(batches(10, 8)))
    known, unknown = ["5 samples, 50%", "10 samples, 100%"], ["8 samples", "10 samples"]
    assert [r.message for r in caplog.records] == [f"verify: {x}" for x in known + unknown]

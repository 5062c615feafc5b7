"""Accuracy and perplexity, of samples and of sequences, alone and over batches."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.functional.affine import full_precision
from qat.training.evaluate import Score, evaluate, first_output, predict, score


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 5))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 11, (10, 6), generator=generator)
    y = torch.randint(0, 5, (10, 6), generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def test_uniform_logits_are_as_perplexed_as_there_are_classes():
    labels = torch.arange(7)
    assert score(torch.zeros(7, 7), labels).perplexity == pytest.approx(7)
    assert score(1000 * torch.eye(7), labels) == Score(100.0, 1.0)


def test_score_is_what_it_says():
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    hits = (logits.argmax(1) == labels).double().mean().item()
    assert score(logits, labels).accuracy == 100.0 * hits
    loss = F.cross_entropy(logits.double(), labels).item()
    assert score(logits, labels).perplexity == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, 0), lambda y: {"logits": y, "aux": 0}])
def test_sequences_become_rows(wrap):
    logits = torch.randn(2, 3, 5)
    assert torch.equal(first_output(wrap(logits)), torch.cat([logits[0], logits[1]]))
    assert torch.equal(first_output(wrap(logits[0])), logits[0])


def test_labels_go_along_with_their_rows(model, batches):
    logits, labels = predict(model, batches)
    assert (logits.shape, labels.shape) == ((60, 5), (60,))
    assert torch.equal(logits[17], model(batches[0][0])[2, 5])
    assert labels[17] == batches[0][1][2, 5]


def test_evaluate_counts_every_token_once(model, batches):
    found, expected = evaluate(model, batches), score(*predict(model, batches))
    assert found.accuracy == expected.accuracy
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


def test_tokens_stay_integers():
    assert full_precision(torch.tensor([3])).dtype is torch.int64
    assert full_precision(torch.ones(1, dtype=torch.bfloat16)).dtype is torch.float32

"""Small floats train: digits, close to the float network; nothing is folded or exported."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from qat.data import DigitsData
from qat.fake_quant import Phase, activation_quants, fake_quants, weight_quants
from qat.graph.insert import prepare
from qat.spec import Rule
from qat.training.callbacks.calibrate import observe
from qat.training.evaluate import evaluate
from tests.helpers import make_scheme
from tests.quantizers.networks import small

POINTS = 1.5
ENDS = {"bits": 8, "quantizer": "uniform"}

pytestmark = pytest.mark.slow


def train(model, data, epochs, lr):
    """Train with SGD and half a cosine."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)
    steps = epochs * len(data.train_dataloader())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    return model


@pytest.fixture(scope="module")
def floats():
    """The data, and the float network, trained."""
    torch.manual_seed(0)
    data = DigitsData()
    data.setup()
    return data, train(small(10), data, 20, 0.1)


@pytest.mark.parametrize(
    ("bits", "quantizer"),
    [
        (8, {"name": "fp8", "format": "e4m3"}),
        (8, {"name": "fp8", "format": "e5m2"}),
        (4, "fp4"),
        (4, "mx"),
        (6, {"name": "mx", "format": "fp6_e2m3"}),
        (8, {"name": "mx", "format": "fp8_e4m3"}),
        (4, "nvfp4"),
    ],
    ids=str,
)
def test_small_floats_are_close_to_float(bits, quantizer, floats):
    data, model = floats
    body = {"quantizer": quantizer}
    scheme = make_scheme(
        bits, bits, weight=body, activation={"signed": "auto", **body},
        rules={"ends": Rule("@first|@last", weight=ENDS, activation=ENDS)},
    )  # fmt: skip
    captured, _ = prepare(deepcopy(model), scheme, data.calibration_batches(1)[0][:2])
    observe(captured, weight_quants(captured), data.calibration_batches(1))
    observe(captured, activation_quants(captured), data.calibration_batches(2))
    train(captured, data, 8, 0.02)
    assert all(quant.phase is Phase.QUANTIZE for quant in fake_quants(captured))
    expected = evaluate(model, data.test_dataloader()).accuracy
    accuracy = evaluate(captured, data.test_dataloader()).accuracy
    assert accuracy >= expected - POINTS

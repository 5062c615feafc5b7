"""Which convolutions train with channels innermost, and that the others change nothing else."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from qat.functional import kept
from qat.graph.insert import prepare
from qat.graph.memory_format import has_other_order, use_channels_last
from qat.training.compiled import training_forward
from tests.helpers import calibrate, make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}


class Tapering(nn.Module):
    """Images that shrink while weights grow."""

    def __init__(self):
        super().__init__()
        self.light, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.heavy, self.behind = nn.Conv2d(16, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.light(x))), 8)
        return self.head(F.relu(self.behind(self.heavy(x))).mean((2, 3)))


def prepared(x):
    torch.manual_seed(0)
    fields = {"weight": LEARNED, "activation": LEARNED}
    captured, _ = prepare(Tapering(), make_scheme(8, 8, **fields), x)
    calibrate(captured, x)
    return captured.train()


def order(model):
    layers = {name: model.get_submodule(name) for name in ("light", "heavy")}
    return {name: has_other_order(layer) for name, layer in layers.items()}


def test_heavy_weights_stay_in_rows():
    """9,216 values against 2 * (64 + 256) for each image: heavy up to 14 images."""
    model = prepared(torch.randn(4, 3, 16, 16))
    use_channels_last(model, 14)
    assert order(model) == {"light": False, "heavy": True}
    use_channels_last(model, 15)
    assert order(model) == {"light": False, "heavy": False}
    model = prepared(torch.randn(4, 3, 16, 16))
    use_channels_last(model)
    assert order(model) == {"light": False, "heavy": False}


def test_a_step_with_both_orders_is_that_of_one(monkeypatch):
    x = torch.randn(4, 3, 16, 16)
    model = prepared(x)
    rows = deepcopy(model)
    use_channels_last(model, len(x))
    copied = []
    kept_in = kept.rearranged
    monkeypatch.setattr(
        "qat.graph.training.rearranged", lambda x, f: copied.append(x) or kept_in(x, f)
    )
    found, expected = (
        torch.autograd.grad(
            F.cross_entropy(training_forward(m, "regional")(x), torch.arange(len(x))),
            list(m.parameters()),
        )
        for m in (model, rows)
    )
    assert [not y.is_contiguous() for y in copied] == [True, False]
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * size, msg=name)
        assert a.is_contiguous() or name.startswith("light"), name

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.graph.insert import prepare
from qat.initialise.equalise import (
    Equalise,
    Pair,
    equalise_pair,
    find_pairs,
    input_ranges,
    output_ranges,
)
from qat.layers import QuantizedLayer
from tests.helpers import calibrate, make_scheme, warm_up

IMAGE = (16, 3, 8, 8)
CASES = {
    "conv": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), ["0", "2"]),
    "nothing between": (nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), ["0", "1"]),
    "to depthwise": (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6)),
        ["0", "2"],
    ),
    "from depthwise": (
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1)),
        ["0", "2"],
    ),
    "to groups": (
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2)),
        ["0", "2"],
    ),
    "pool": (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 4, 3)),
        ["0", "3"],
    ),
    "batch-norm": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
        ),
        ["0", "3"],
    ),
    "flatten": (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(24, 5)
        ),
        ["0", "4"],
    ),
    "linear": (
        nn.Sequential(
            nn.Flatten(), nn.Linear(192, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 5, bias=False)
        ),
        ["1", "4"],
    ),
}


def spread(model):
    """Scale the first layer's output channels apart: 0.1 to 10 times, in every order."""
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    with torch.no_grad():
        factors = torch.logspace(-1, 1, len(first.weight))
        first.weight.mul_(factors.view(-1, *[1] * (first.weight.ndim - 1)))
    return model


@pytest.mark.parametrize("case", CASES)
def test_ranges_are_equal_and_the_function_is_the_same(case):
    model, (first, second) = CASES[case]
    x = torch.randn(IMAGE)
    model = spread(warm_up(model, x))
    captured, _ = prepare(model, make_scheme(), x[:2])
    captured.eval()
    before = captured(x)
    done = Equalise()(captured, [], captured)
    assert done == f"equalised 1 pairs of layers: {first} > {second}"
    a, b = captured.get_submodule(first), captured.get_submodule(second)
    assert isinstance(a, QuantizedLayer)
    assert isinstance(b, QuantizedLayer)
    r1, r2 = output_ranges(a), input_ranges(b, len(a.raw_weight))
    if a.links.batch_norm is not None:
        norm = a.links.batch_norm
        r1 = r1 * (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
    assert r1.min() > 0
    torch.testing.assert_close(r1, r2, rtol=1e-5, atol=0)  # a few roundings of float32
    torch.testing.assert_close(captured(x), before, rtol=1e-4, atol=1e-5)
    if case != "linear":  # dropout draws
        torch.testing.assert_close(captured.train()(x), model.train()(x), rtol=1e-4, atol=1e-5)


def test_equation_11():
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[8.0, -1.0], [0.0, 0.0]]))
        first.bias.copy_(torch.tensor([4.0, 1.0]))
        second.weight.copy_(torch.tensor([[-0.5, 3.0]]))
    captured, _ = prepare(nn.Sequential(first, nn.ReLU(), second), make_scheme(), torch.randn(2, 2))
    assert find_pairs(captured) == [Pair("0", "2", None)]
    assert equalise_pair(captured, Pair("0", "2", None)) == pytest.approx(torch.tensor(4.0).log())
    state = captured.state_dict()  # s = sqrt(8 * 0.5) / 0.5 = 4; a channel of zeros stays
    assert state["0.weight"].tolist() == [[2.0, -0.25], [0.0, 0.0]]
    assert state["0.bias"].tolist() == [1.0, 1.0]
    assert state["2.weight"].tolist() == [[-2.0, 3.0]]


class Branches(nn.Module):
    """Layers that must not be scaled: all the reasons there are."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.twice = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.gelu, self.six, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.plain = nn.BatchNorm2d(3, affine=False)
        self.tied = nn.Conv2d(3, 3, 1)
        self.transposed = nn.ConvTranspose2d(3, 3, 1)
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = self.stem(x)  # read twice
        x = self.left(x) + self.right(x)  # sums
        x = self.twice(F.relu(self.twice(x)))
        x = F.gelu(self.gelu(x))
        x = F.relu6(self.six(x))
        x = self.plain(self.tied(x))
        x = self.transposed(x)
        x = F.conv2d(x, self.weight)  # functional
        return self.head(self.last(x).amax((2, 3)))


def test_what_is_left_alone():
    captured, _ = prepare(Branches(), make_scheme(), torch.randn(2, 3, 4, 4))
    assert find_pairs(captured) == []
    before = {k: v.clone() for k, v in captured.state_dict().items()}
    assert Equalise()(captured, [], captured) == "equalised 0 pairs of layers"
    assert all(torch.equal(v, before[k]) for k, v in captured.state_dict().items())


def test_tied_weights_are_left_alone():
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    third.weight = second.weight
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    captured, _ = prepare(model, make_scheme(), torch.randn(2, 4))
    assert find_pairs(captured) == []


def test_a_chain_converges():
    x = torch.randn(IMAGE)
    model = spread(nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(3, 3, 1), nn.ReLU())]))
    captured, _ = prepare(model, make_scheme(), x[:2])
    before = captured.eval()(x)
    Equalise()(captured, [], captured)
    for pair in find_pairs(captured):
        assert equalise_pair(captured, pair) < 1e-3
    assert len(find_pairs(captured)) == 3
    torch.testing.assert_close(captured(x), before, rtol=1e-4, atol=1e-6)


def error(model, x, initialise):
    """The largest error of 8-bit weights with one scale for each tensor, relative."""
    captured, _ = prepare(model, make_scheme(8, 16, weight={"axis": None}), x[:2])
    expected = captured.eval()(x)
    if initialise:
        Equalise()(captured, [], captured)
    calibrate(captured, x)
    return ((captured(x) - expected).abs().max() / expected.abs().max()).item()


def test_it_matters_for_one_scale_per_tensor():
    """Channels 100 times apart: the narrow ones have the codes -1 to 1 of 127, on both sides.

    Equalised, all have about the same range, and so about all codes: the error falls by most of
    100 (by 42 to 79 in twelve draws).
    """
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    factors = torch.tensor([1.0, 100.0] * 4)
    with torch.no_grad():
        first.weight.mul_(factors.view(-1, 1, 1, 1))
        first.bias.mul_(factors)  # pyright: ignore[reportOptionalMemberAccess]
        second.weight.div_(factors.view(1, -1, 1, 1))
    model, x = nn.Sequential(first, nn.ReLU(), second), torch.randn(IMAGE)
    assert error(model, x, initialise=True) * 30 < error(model, x, initialise=False)

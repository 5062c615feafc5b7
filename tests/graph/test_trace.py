import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat.errors import GraphError
from qat.graph.equality import check_equal
from qat.graph.insert import prepare
from qat.graph.trace import capture
from tests.helpers import make_scheme

CHANNELS = 8


class Everything(nn.Module):
    """What real models do that makes tracing hard, in one forward."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, CHANNELS, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(CHANNELS, 1, 1))
        self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.depth = StochasticDepth(0.5, "row")
        self.drop = nn.Dropout(0.5)
        self.aux = nn.Linear(CHANNELS, 4)
        self.fc = nn.Linear(CHANNELS, 4)

    def forward(self, x):
        if self.training:
            x = x + torch.full((3, 1, 1), 0.25)  # a constant of training alone, made first
        x = self.relu(self.bn(self.conv(x))) * self.gain + self.shift
        y = self.relu(self.conv2(x))
        y += torch.linspace(0, 1, CHANNELS).view(1, CHANNELS, 1, 1)
        x = x + self.depth(y)
        x = F.relu(x, inplace=True).clamp_(max=3.0)
        pooled = self.drop(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        if self.training:
            return self.fc(pooled), self.aux(pooled)
        return self.fc(pooled)


def run(model, x, *, training):
    model.train(training)
    torch.manual_seed(3)
    with torch.no_grad():
        return model(x.clone())


def assert_same(a, b):
    for left, right in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
        assert torch.equal(left, right)


@pytest.mark.parametrize("training", [True, False])
def test_captured_is_the_original(training):
    model, x = Everything(), torch.randn(4, 3, 8, 8)
    reference = copy.deepcopy(model)
    captured = capture(model, x)
    expected = run(reference, x, training=training)
    assert isinstance(expected, tuple) is training
    assert_same(expected, run(captured, x, training=training))
    # batch-norm statistics moved alike
    for name, value in reference.state_dict().items():
        assert torch.equal(captured.state_dict()[name], value)


def test_dropout_is_random_in_train_and_off_in_eval():
    captured, x = capture(Everything(), torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8)
    captured.train()
    assert not torch.equal(captured(x)[0], captured(x)[0])
    captured.eval()
    assert torch.equal(captured(x), captured(x))


def test_names_and_their_order_stay():
    model = Everything()
    captured = capture(copy.deepcopy(model), torch.randn(2, 3, 8, 8))
    assert list(captured.state_dict()) == list(model.state_dict())
    assert [n for n, _ in captured.named_parameters()] == [n for n, _ in model.named_parameters()]
    model.load_state_dict(captured.state_dict(), strict=True)


def test_constants_of_the_forward_follow_to_and_are_no_state():
    model = Everything()
    captured = capture(model, torch.randn(2, 3, 8, 8))
    names = {n for n, _ in captured.named_buffers()} - set(captured.state_dict())
    constants = [captured.get_buffer(n) for n in names]
    assert sorted(c.numel() for c in constants) == [3, CHANNELS]
    captured.to(torch.float64)
    assert all(captured.get_buffer(n).dtype == torch.float64 for n in names)
    captured.eval()(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert not any(n.startswith("_tensor_constant") for n in vars(model))


def test_non_persistent_buffers_stay_out_of_the_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("grid", torch.ones(3), persistent=False)

        def forward(self, x):
            return x * self.grid

    captured = capture(Model(), torch.randn(2, 3))
    assert list(captured.state_dict()) == []
    assert "grid" in dict(captured.named_buffers())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("training", [True, False])
def test_copies_compute_the_same_and_share_nothing(clone, training):
    x = torch.randn(4, 3, 8, 8)
    captured, _ = prepare(Everything(), make_scheme(), x)
    twin = clone(captured)
    state = twin.state_dict()
    assert list(state) == list(captured.state_dict())
    assert_same(run(captured, x, training=training), run(twin, x, training=training))
    with torch.no_grad():
        captured.get_parameter("gain").zero_()
    assert state["gain"].abs().min() > 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deep_models_are_copied_without_recursion(clone):
    layers = [nn.Linear(4, 4) if i % 2 else nn.ReLU() for i in range(400)]
    captured = capture(nn.Sequential(*layers), torch.randn(2, 4))
    x = torch.randn(3, 4)
    assert torch.equal(clone(captured)(x), captured(x))


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # the line that errors shall name


def test_control_flow_on_values_leaves_its_module_whole():
    model = nn.Sequential()
    model.add_module("first", nn.Tanh())
    model.add_module("inner", nn.Sequential(Branch(), nn.Linear(3, 3)))
    captured = capture(model, torch.randn(2, 3))
    assert captured.leaves == ["inner.0"]
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        assert torch.equal(captured(x), model(x))


def test_control_flow_on_values_in_the_model_itself_names_the_line():
    with pytest.raises(GraphError, match="the model itself") as caught:
        capture(Branch(), torch.randn(2, 3))
    found = re.search(r"(\S+):(\d+) \((.*)\)", str(caught.value))
    assert found is not None
    assert found[1].endswith("test_trace.py")
    assert int(found[2]) == Branch.forward.__code__.co_firstlineno + 1
    assert "x.sum() > 0" in found[3]


def test_input_of_the_wrong_shape():
    with pytest.raises(GraphError, match=r"shape \(2, 1, 8, 8\).*3 channels"):
        capture(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 1, 8, 8))


def test_errors_without_a_message_are_reported_too():
    class Picky(nn.Module):
        def forward(self, x):
            if x.shape[1] != 3:
                raise ValueError
            return x

    with pytest.raises(GraphError, match=r"ValueError \(\) at .*test_trace\.py"):
        capture(Picky(), torch.randn(2, 1))


def test_subclasses_of_layers_are_layers():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return super().forward(input * 2)

    model, x = nn.Sequential(Scaled(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    captured, plan = prepare(model, make_scheme(), x)
    assert list(plan.weights) == ["0"]
    assert torch.equal(captured(x), model(x))


def test_what_tracing_cannot_see_is_found_out():
    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = Counting()
    captured = capture(copy.deepcopy(model), torch.randn(2, 3))
    with pytest.raises(GraphError, match=r"other outputs in (eval|train) mode"):
        check_equal(copy.deepcopy(model), captured, after="capture")


@pytest.mark.parametrize("name", ["mode", "graphs", "source", "example", "activations", "views"])
def test_submodules_with_our_names_are_refused(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x):
            return getattr(self, name)(x)

    with pytest.raises(GraphError, match=f"'{name}'"):
        prepare(Model(), make_scheme(), torch.randn(2, 4))


def snapshot(model):
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    inside = {n: (type(m), sorted(vars(m)), m.training) for n, m in model.named_modules()}
    return tensors, inside


@pytest.mark.parametrize("training", [True, False])
def test_prepare_leaves_the_users_model_alone(training):
    model = Everything().train(training)
    tensors, inside = snapshot(model)
    captured, _ = prepare(model, make_scheme(), torch.randn(4, 3, 8, 8))
    assert captured.training is training
    after, inside_after = snapshot(model)
    assert inside == inside_after
    assert all(torch.equal(tensors[k], after[k]) for k in tensors)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in captured.parameters()}


def test_prepare_leaves_statistics_where_they_were():
    model = Everything()
    captured, _ = prepare(model, make_scheme(), torch.randn(4, 3, 8, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(captured.state_dict()[name], value)


def test_prepare_uses_no_random_numbers():
    torch.manual_seed(1)
    model, x = Everything(), torch.randn(2, 3, 8, 8)
    before = torch.get_rng_state()
    prepare(model, make_scheme(), x)
    assert torch.equal(before, torch.get_rng_state())

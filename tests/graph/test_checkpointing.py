"""Checkpointing: the same losses, gradients, weights and state, every bit; and less kept."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.batch_norm import freeze_batch_norm
from qat.fake_quant import Phase, fake_quants
from qat.functional import fused, kept
from qat.functional.fused import fused_kernels
from qat.graph.captured import make_function
from qat.graph.checkpointing import checkpointed, runs_again
from qat.graph.insert import prepare
from qat.graph.segments import split
from qat.graph.training import training_graph
from qat.layers import fold
from qat.models import build
from qat.training.compiled import training_forward
from tests.helpers import calibrate, kept_bytes, make_scheme

LEARNED = {"quantizer": "lsq", "observer": "min_max"}
LIVE = {"quantizer": "uniform", "observer": "moving_average"}
STOCHASTIC = {**LIVE, "quantizer": {"name": "uniform", "rounding": "stochastic"}}


class Inverted(nn.Module):
    """Expand, convolve each channel, project; add what came in; activations in place."""

    def __init__(self, channels):
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide, momentum=None),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6(True))
        self.blocks = nn.Sequential(*(Inverted(8) for _ in range(3)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.dropout(self.blocks(self.stem(x)).mean((2, 3)), 0.2, self.training))


class Layer(nn.Module):
    """Attention and a perceptron with dropout."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.drop = nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout(0.3)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * 0.25 + mask, -1)
        x = x + self.drop(self.out(torch.matmul(weights, v)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    """Every layer reads the same mask: two tensors are alive between them."""

    mask: torch.Tensor

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(24, 16), nn.ModuleList(Layer() for _ in range(3))
        self.register_buffer("mask", torch.full((8, 8), -1e4).triu(1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x.flatten(1).unflatten(1, (8, 24)))
        mask = self.mask * 1.0
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x.mean(1))


MODELS = {"resnet": lambda: build("resnet20", 5), "mobilenet": MobileNet, "vit": Transformer}


def all_to(phase):
    def enter(model):
        for fake_quant in fake_quants(model):
            fake_quant.set_phase(phase)

    return enter


def freeze(model):
    all_to(Phase.FROZEN)(model)
    freeze_batch_norm(model)


STAGES = {
    "float": all_to(Phase.FLOAT),
    "observe": all_to(Phase.OBSERVE),
    "quantize": lambda model: None,
    "frozen": all_to(Phase.FROZEN),
    "frozen batch-norm": freeze,
    "folded": lambda model: (freeze(model), fold(model)),
}


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fused, "LEAST", 1)


def prepared(name, fields, **scheme):
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    scheme = make_scheme(8, 8, weight=fields, activation=fields, **scheme)
    captured, _ = prepare(MODELS[name]().train(), scheme, x[:2])
    calibrate(captured, x)
    return captured.train()


def train(model, forward, seed=1):
    """Return the losses of three steps, and the gradients of the last."""
    torch.manual_seed(seed)
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for _ in range(3):
        x = torch.randn(6, 3, 8, 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), torch.arange(6) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {n: p.grad for n, p in model.named_parameters()}


def check_same(plain, mode, checkpointing="auto"):
    again = deepcopy(plain)
    (losses, gradients), (other_losses, other_gradients) = (
        train(model, training_forward(model, mode, c))
        for model, c in ((plain, "off"), (again, checkpointing))
    )
    assert torch.equal(losses, other_losses)
    for name, gradient in gradients.items():
        other = other_gradients[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.equal(gradient, other), name
    ours, theirs = again.state_dict(), plain.state_dict()
    assert [k for k in theirs if not torch.equal(ours[k], theirs[k])] == []
    buffers = dict(plain.named_buffers())
    assert [n for n, b in again.named_buffers() if not torch.equal(b, buffers[n])] == []
    for a, b in zip(fake_quants(again), fake_quants(plain), strict=True):
        assert {k: v for k, v in vars(a.observer).items() if isinstance(v, int | float)} == {
            k: v for k, v in vars(b.observer).items() if isinstance(v, int | float)
        }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, LEARNED) for name in MODELS),
        ("resnet", LIVE),
        *(pytest.param(name, LIVE, marks=pytest.mark.slow) for name in ("mobilenet", "vit")),
    ],
    ids=lambda v: {id(LEARNED): "learned", id(LIVE): "live"}.get(id(v), v),
)
def test_every_bit_is_the_same(name, fields, stage):
    model = prepared(name, fields)
    STAGES[stage](model)
    check_same(model, "off")


@pytest.mark.parametrize("stage", STAGES)
def test_so_it_is_with_fused_kernels(stage):
    model = prepared("resnet", LEARNED)
    STAGES[stage](model)
    check_same(model, "regional")


@pytest.mark.parametrize("name", ["mobilenet", pytest.param("vit", marks=pytest.mark.slow)])
def test_and_other_models(name):
    check_same(prepared(name, LEARNED), "regional")


def test_and_live_observers():
    check_same(prepared("resnet", LIVE), "regional", 4)


def test_a_grid_on_folded_weights_is_that_of_before_the_batch_moved_the_statistics():
    """The batch-norm stands behind the layer whose weight its running variance scales."""
    for mode in ("off", "regional"):
        check_same(prepared("resnet", LIVE, batch_norm="folded"), mode, 50)


def test_stochastic_rounding_rounds_the_same_way_again():
    check_same(prepared("mobilenet", STOCHASTIC), "off")


@pytest.mark.parametrize(
    "weight",
    [{"quantizer": "ir_net", "bits": 1}, {"quantizer": "apot", "bits": 4}],
    ids=["ir_net", "apot"],
)
def test_statistics_of_weights_are_taken_once(weight):
    scheme, x = (
        make_scheme(weight={**weight, "axis": None}, activation=LIVE),
        torch.randn(6, 3, 8, 8),
    )
    captured, _ = prepare(MobileNet(), scheme, x[:2])
    calibrate(captured, x)
    check_same(captured.train(), "off")


class Counter(nn.Module):
    """Code that nobody has looked into: it counts its calls, and looks at values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.python_calls = 0

    def forward(self, x):
        self.calls += 1
        self.python_calls += 1
        return x * (1 + 0.1 * self.calls) if x.sum() > -1e9 else x


def test_modules_that_nobody_knows_count_their_calls_once():
    def body():
        return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Counter(), nn.ReLU())

    model = nn.Sequential(body(), body(), body(), nn.Flatten(), nn.Linear(192, 5))
    captured, _ = prepare(model, make_scheme(activation=LEARNED), torch.randn(2, 3, 8, 8))
    assert len(captured.leaves) == 3
    calibrate(captured, torch.randn(6, 3, 8, 8))
    counters = [m for m in captured.train().modules() if isinstance(m, Counter)]
    before = [(int(c.calls), c.python_calls) for c in counters]
    train(captured, training_forward(captured, "off", 50))
    assert [(int(c.calls), c.python_calls) for c in counters] == [(a + 3, b + 3) for a, b in before]
    check_same(captured, "off", 50)


class Silent(nn.Module):
    """Changes in place what stands at the end of a block, and not idempotently."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(192, 5)

    def forward(self, x):
        for conv in self.convs:
            x = F.silu(conv(x), inplace=True).add_(1)
            x += 0.5
        return self.head(x.flatten(1))


def test_no_segment_changes_what_it_reads():
    torch.manual_seed(0)
    captured, _ = prepare(Silent(), make_scheme(activation=LEARNED), torch.randn(2, 3, 8, 8))
    check_same(captured.train(), "off", 50)
    calibrate(captured, torch.randn(6, 3, 8, 8))
    check_same(captured.train(), "off", 50)


@pytest.mark.parametrize(
    ("name", "count", "alive"), [("resnet", 4, 1), ("mobilenet", 3, 1), ("vit", 4, 2)]
)
def test_segments_end_where_little_is_alive(name, count, alive):
    model = prepared(name, LEARNED)
    graph = training_graph(model)
    parts = split(graph, dict(model.named_modules()), count)
    assert len(parts) == count
    assert max(len(part.gives) for part in parts[1:]) == alive  # the first is a block and its stem
    nodes = [node for part in parts for node in part.nodes]
    assert nodes == [n for n in graph.nodes if n.op not in ("placeholder", "get_attr")]


@pytest.mark.parametrize("name", MODELS)
def test_less_is_kept(name):
    model, x = prepared(name, LEARNED), torch.randn(64, 3, 8, 8, requires_grad=True)
    graph = training_graph(model)
    all_of_it, less = (
        kept_bytes(model, x, lambda x, f=f: model.call(f, x), kept._pack)
        for f in (make_function(graph), checkpointed(model, graph, None, fused_kernels))
    )
    assert less < 0.45 * all_of_it


def test_a_backward_can_be_repeated():
    model = prepared("vit", LIVE)
    loss = training_forward(model, "off", 4)(torch.randn(6, 3, 8, 8)).square().sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    state = deepcopy(model.state_dict())
    first, second = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_mixed_precision_is_that_of_the_forward():
    def in_bfloat16(forward):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return run

    plain = prepared("mobilenet", LIVE)
    again = deepcopy(plain)
    found = [
        train(m, in_bfloat16(training_forward(m, "off", c)))
        for m, c in ((plain, "off"), (again, 5))
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert all(g is None or torch.equal(g, found[1][1][n]) for n, g in found[0][1].items())


def test_what_looks_at_tensors_can_tell_that_it_has_seen_them():
    model, seen = prepared("resnet", LEARNED), []
    model.get_submodule("layer1.0.conv1").register_forward_hook(
        lambda *args: seen.append(runs_again())
    )
    training_forward(model, "off", 4)(torch.randn(6, 3, 8, 8)).sum().backward()
    assert seen == [False, True]
    assert not runs_again()


def test_evaluation_and_inference_run_as_they_are():
    model, x = prepared("resnet", LEARNED), torch.randn(6, 3, 8, 8)
    forward = training_forward(model, "off", "auto")
    with torch.no_grad():
        assert not forward(x).requires_grad
    assert torch.equal(model.eval()(x), forward(x))


@pytest.mark.slow
def test_ranks_that_share_statistics_agree_again(two_ranks):
    """Batch-norms and observers add up over both, in the forward and again in the backward."""
    script = """
        from tests.graph.test_checkpointing import LIVE, deepcopy, prepared, train, training_forward
        from qat.batch_norm import batch_norms

        torch.set_num_threads(1)
        plain, found = prepared("mobilenet", LIVE), {}
        for norm in batch_norms(plain):
            norm.synchronised = True
        for checkpointing in ("off", "auto"):
            model = deepcopy(plain)
            found[checkpointing] = train(model, training_forward(model, "off", checkpointing), rank)
            found[checkpointing] += (dict(model.named_buffers()),)
        torch.save(found, out)
    """
    for found in two_ranks(script):
        losses, gradients, buffers = found["off"]
        other_losses, other_gradients, other_buffers = found["auto"]
        assert torch.equal(losses, other_losses)
        assert all(g is None or torch.equal(g, other_gradients[n]) for n, g in gradients.items())
        assert all(torch.equal(b, other_buffers[n]) for n, b in buffers.items())

"""Models of any form are captured unchanged: arguments, outputs, sharing, functions, attention."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.errors import GraphError
from qat.fake_quant import FakeQuant
from qat.graph.convert import convert
from qat.graph.equality import difference, run_seeded
from qat.graph.insert import prepare
from qat.graph.trace import capture
from qat.layers import fold
from qat.reference.run import IntegerRun
from tests.helpers import calibrate, make_scheme


def assert_equal_in_both_modes(model, captured, tolerance=1e-6):
    for mode in ("train", "eval"):
        ours, theirs = (copy.deepcopy(m) for m in (captured, model))
        gap = difference(run_seeded(theirs, captured, mode), run_seeded(ours, captured, mode))
        assert gap is not None
        assert gap <= tolerance
        states = ours.state_dict(), theirs.state_dict()
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[1])  # statistics moved


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.table = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, image, table, *, scale=1.0, mask=None):
        x = self.image(image).mean((2, 3)) + self.table(table) * scale
        x = x if mask is None else x * mask
        return {"logits": self.head(x), "features": [x, (x + 1, None)]}


def test_several_inputs_by_name_and_position_and_a_tree_of_outputs():
    model = TwoInputs()
    image, table, mask = torch.randn(2, 3, 8, 8), torch.randn(2, 5), torch.rand(2, 4)
    example = {"image": image, "table": table, "mask": mask, "scale": 2.0}
    captured, plan = prepare(model, make_scheme(), example)
    assert_equal_in_both_modes(model, capture(model, example))
    assert set(plan.weights) == {"image", "table", "head"}
    result = captured(image, table, mask=mask, scale=2.0)
    assert result.keys() == {"logits", "features"}
    assert result["features"][1][1] is None
    assert difference(result, model(image, table, mask=mask, scale=2.0)) == 0.0


def test_calls_of_another_form_are_refused():
    model = TwoInputs()
    captured = capture(model, (torch.randn(2, 3, 8, 8), torch.randn(2, 5)))
    with pytest.raises(GraphError, match="expected a call like the captured one"):
        captured(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_number_of_samples_runs(batch):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x):
            n, length, width = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
            return y + torch.zeros(n, 1, width) + torch.arange(n).view(-1, 1, 1)

    model = Heads()
    captured = capture(model, torch.randn(3, 6, 8))
    x = torch.randn(batch, 6, 8)
    torch.testing.assert_close(captured(x), model(x), rtol=1e-5, atol=1e-6)


def test_control_flow_on_shapes_is_run():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x):
            while min(x.shape[2:]) > 2:
                x = F.relu(self.conv(x))
                if x.size(-1) % 2 == 0 and len(x) > 0:
                    x = F.max_pool2d(x, 2)
                assert x.dim() == 4, f"{x.shape}"
            return x.flatten(1)

    model = Pyramid()
    captured = capture(model, torch.randn(2, 2, 16, 16))
    assert_equal_in_both_modes(model, captured)
    assert sum(n.target == "conv" for n in captured.graphs["eval"].nodes) == 3
    with pytest.raises(GraphError, match=r"expected samples of shape .*capture it again"):
        capture(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), torch.randn(2, 8))(torch.randn(2, 9))


def test_a_module_used_three_times_has_one_weight_and_three_activations():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            for _ in range(3):
                x = self.act(self.layer(x))
            return self.head(x)

    captured, plan = prepare(Thrice(), make_scheme(), torch.randn(4, 4))
    assert set(plan.weights) == {"layer", "head"}
    assert set(plan.activations) == {"input.x", "act", "act_2", "act_3"}
    quants = [m for m in captured.modules() if isinstance(m, FakeQuant)]
    assert len(quants) == 6


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(F.gelu(self.mix(self.embed(words))))


@pytest.mark.parametrize(
    "clone", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_tied_weights_stay_tied_and_share_their_codes(clone):
    captured, plan = prepare(Tied(), make_scheme(), torch.randint(0, 11, (3, 5)))
    captured = clone(captured)
    embed, head = captured.get_submodule("embed"), captured.get_submodule("head")
    assert embed._parameters["weight"] is head._parameters["weight"]
    assert embed.weight_quant is head.weight_quant
    assert set(plan.weights) == {"embed", "mix", "head"}
    calibrate(captured, torch.randint(0, 11, (3, 5)))
    assert torch.equal(embed.weight, head.weight)
    assert len({id(p) for p in captured.parameters()}) == len(list(captured.parameters()))


class Functional(nn.Module):
    """Layers written as functions, a batch-norm too, with a buffer that it counts in."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.norm = Counted(4)
        self.out_weight, self.out_bias = (
            nn.Parameter(torch.randn(2, 4)),
            nn.Parameter(torch.randn(2)),
        )

    def forward(self, x):
        x = F.relu(self.norm(F.conv2d(x, self.kernel, padding=1)))
        return F.linear(x.mean((2, 3)), self.out_weight, self.out_bias.clone())


class Counted(nn.BatchNorm2d):
    num_batches_tracked: torch.Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def forward(self, input):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training, self.momentum, self.eps)  # fmt: skip


def test_functional_layers_are_layers():
    model, x = Functional(), torch.randn(4, 3, 8, 8)
    assert_equal_in_both_modes(model, capture(model, x))
    captured, plan = prepare(model, make_scheme(), x)
    assert {(w.layer, w.op) for w in plan.weights.values()} == {
        ("kernel", "conv2d"),
        ("out", "linear"),
    }
    assert plan.weights["kernel"].batch_norm == "views.norm"  # folds as any other does
    assert plan.float_share == 0
    ours = [name for name, _ in captured.named_parameters()]
    assert ours == [name for name, _ in model.named_parameters()]
    view = captured.get_submodule("views.kernel")
    assert view._parameters["weight"] is captured._parameters["kernel"]


def test_functional_layers_become_integers():
    x = torch.randn(8, 3, 8, 8)
    captured, _ = prepare(Functional(), make_scheme(), x)
    calibrate(captured, x)
    fold(captured)
    captured.eval()
    torch.testing.assert_close(IntegerRun(convert(captured))(x), IntegerRun(captured)(x))
    codes = convert(captured).get_submodule("views.kernel").weight_codes
    assert codes.dtype == torch.int8


def test_state_of_a_model_with_views_comes_back():
    x = torch.randn(8, 3, 8, 8)
    first, _ = prepare(Functional(), make_scheme(), x)
    calibrate(first, x)
    second, _ = prepare(Functional(), make_scheme(), x)
    second.load_state_dict(first.state_dict())  # strict: no key twice, none missing
    assert torch.equal(second.eval()(x), first.eval()(x))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x, **options):
        return self.attention(x, x, x, **options)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
        {"attn_mask": torch.randn(6, 6)},
        {"attn_mask": torch.randn(6, 6), "key_padding_mask": torch.zeros(3, 6)},
    ],
)
def test_attention_is_taken_apart_and_computes_the_same(batch_first, bias, options):
    model = Attention(batch_first=batch_first, bias=bias)
    x = torch.randn(3, 6, 8) if batch_first else torch.randn(6, 3, 8)
    captured = capture(model, {"x": x, **options})
    assert_equal_in_both_modes(model, captured, tolerance=1e-5)
    products = [n for n in captured.graphs["eval"].nodes if n.target is torch.matmul]
    assert len(products) == 2


def test_products_of_attention_are_quantized_or_left_whole():
    model, x = Attention(batch_first=True, dropout=0.5), torch.randn(3, 6, 8)
    _, plan = prepare(model, make_scheme(), x)
    assert plan.float_share == 0
    assert {"attention.in_proj", "attention.softmax"} <= set(plan.activations)
    whole = capture(model, x, whole_attention=True)
    assert [n.target for n in whole.graphs["eval"].nodes if n.op == "call_module"] == ["attention"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(6, 6) > 0},
        {"attn_mask": torch.randn(6, 6)},
        {"enable_gqa": True},
    ],
)
def test_scaled_dot_product_of_any_options(options):
    class Model(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, **options)

    heads = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8), torch.randn(2, heads, 6, 8)
    if "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
        options = {"attn_mask": options["attn_mask"] | torch.eye(6, dtype=torch.bool)}
    assert_equal_in_both_modes(Model(), capture(Model(), (q, k, v)), tolerance=1e-5)


class Router(nn.Module):
    """Its control flow looks at values, so it is left whole; its layers are quantized."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.low(x) if x.mean() < 100 else self.high(x)


def test_layers_inside_what_cannot_be_traced_are_quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Router(), nn.Linear(6, 2))
    x = torch.randn(16, 6)
    captured, plan = prepare(model, make_scheme(), x)
    assert captured.leaves == ["2"]
    assert plan.weights["2.low"].inner
    assert plan.weights["2.low"].source == "2.low.input"
    assert plan.float_share == 0
    before = captured.eval()(x)
    calibrate(captured, x)
    assert not torch.equal(captured.eval()(x), before)
    fold(captured)
    converted = convert(captured)
    torch.testing.assert_close(IntegerRun(converted)(x), IntegerRun(captured)(x))
    assert converted.get_submodule("2.low").weight_codes.dtype == torch.int8


def test_writing_into_tensors_and_constants_is_kept_in_order():
    class Writing(nn.Module):
        count: torch.Tensor

        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            self.count.add_(1)
            y = self.linear(x)
            y[:, 0] = 0.0
            y += self.count
            mask = x.new_zeros(x.shape)
            mask[:, 1:] = 1
            return nn.ReLU()(y * mask)

    model = Writing()
    captured = capture(model, torch.randn(2, 4))
    assert_equal_in_both_modes(model, captured)
    assert captured.get_buffer("count").item() == model.count.item() == 0


def test_residual_stream_that_only_norms_read_stays_float():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = x + self.mix(self.norm(x))
            return self.head(self.last(x))

    _, plan = prepare(Block(), make_scheme(), torch.randn(4, 5, 8))
    assert set(plan.activations) == {"norm", "last"}
    assert ("add", "nothing behind it reads integers") in [(f.op, f.reason) for f in plan.floats]


class Lazy(nn.Module):
    """Makes a table for the size that it sees at its first call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1] * 4.0).view(-1, 4)
            self.register_buffer("last", torch.ones(4), persistent=False)
        return self.linear(x) * self.last + self.table


def test_tables_made_at_the_first_call_are_captured():
    model, x = Lazy().eval(), torch.randn(2, 3, 4)
    captured, _ = prepare(model, make_scheme(), x)
    assert model.table.shape == (1, 1)
    assert torch.equal(captured.eval()(x), model(x))


class Remembering(nn.Module):
    """Keeps what it computed from a parameter, as models do that save work in eval mode."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.cache, self.last = {}, None

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)

    def forward(self, x):
        if not self.training and "twice" not in self.cache:
            self.cache["twice"] = self.table * 2
        self.last = self.linear(x) + (self.table * 2 if self.training else self.cache["twice"])
        return self.last


def test_what_a_forward_keeps_is_not_what_was_traced():
    model, x = Remembering(), torch.randn(2, 4)
    captured, _ = prepare(model, make_scheme(), x)
    assert (model.cache, model.last) == ({}, None)
    twin = copy.deepcopy(captured).eval()
    with torch.no_grad():
        twin.get_parameter("table").mul_(3.0)
        model.table.mul_(3.0)
    assert torch.equal(twin(x), model.eval()(x))


@pytest.mark.parametrize(
    ("pool", "own"),
    [
        (lambda x: F.max_pool2d(x, 2), False),
        (lambda x: F.adaptive_max_pool2d(x, 2), False),
        (lambda x: x.amax((2, 3), keepdim=True), False),
        (lambda x: F.dropout2d(x, 0.5, False), False),
        (lambda x: F.avg_pool2d(x, 2), True),
    ],
)
def test_pools_that_choose_values_share_their_scale(pool, own):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(pool(self.a(x)))

    _, plan = prepare(Net(), make_scheme(), torch.randn(2, 3, 8, 8))
    assert list(plan.activations) == ["input.x", "a", *(["average_pool"] if own else [])]

"""The plan is true: what it calls float runs in float in the integer reference and in the file."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat.export.onnx import export_onnx
from qat.graph.convert import convert
from qat.graph.op_names import op_name
from qat.graph.ops import OPS
from qat.graph.planner import make_plan
from qat.graph.trace import capture
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.helpers import make_scheme
from tests.products import assert_true, count_file, planned

WIDTH = 4


class Between(nn.Module):
    """An operation between two layers: it reads codes where it can, and its result is read."""

    def __init__(self, operation, rank=4, module=None):
        super().__init__()
        layer = {
            3: nn.Linear,
            4: lambda i, o: nn.Conv2d(i, o, 1),
            5: lambda i, o: nn.Conv3d(i, o, 1),
        }
        self.first, self.last = layer[rank](WIDTH, WIDTH), layer[rank](WIDTH, WIDTH)
        self.operation, self.rank = operation, rank
        self.module = nn.Identity() if module is None else module

    def forward(self, x):
        y = self.operation(self.module, self.first(x))
        return self.last(y).flatten(1)


class Words(nn.Module):
    def __init__(self, kind=nn.Embedding):
        super().__init__()
        self.rows, self.last = kind(7, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.rows(x)).flatten(1)


def row(operation, module=None, rank=4):
    return lambda: Between(operation, rank, module and module())


def layer(make, rank=4):
    return lambda: Between(lambda m, x: m(x), rank, make())


def sequence(operation, module=None):
    return row(operation, module, rank=3)


ROWS = {
    "conv1d": layer(lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1)), rank=3),
    "conv2d": layer(lambda: nn.Conv2d(WIDTH, WIDTH, 3, groups=2, padding=1)),
    "conv3d": layer(lambda: nn.Conv3d(WIDTH, WIDTH, 3, padding=1), rank=5),
    "conv_transpose1d": layer(lambda: nn.ConvTranspose1d(5, 5, 3, padding=1), rank=3),
    "conv_transpose2d": layer(lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2, groups=2)),
    "conv_transpose3d": layer(lambda: nn.ConvTranspose3d(WIDTH, WIDTH, 2, 2), rank=5),
    "linear": layer(lambda: nn.Linear(WIDTH, WIDTH), rank=3),
    "matmul": sequence(lambda m, x: x @ x.transpose(1, 2) @ x),
    "einsum": sequence(lambda m, x: torch.einsum("nij,nij->nij", x, x)),
    "add": row(lambda m, x: x + x.flip(1)),
    "mul": row(lambda m, x: x * x.flip(1)),
    "average_pool": layer(lambda: nn.AvgPool2d(2)),
    "concat": row(lambda m, x: torch.cat([x, x.flip(2)], 3)),
    "relu": layer(nn.ReLU),
    "relu6": layer(nn.ReLU6),
    "sigmoid": layer(nn.Sigmoid),
    "hardsigmoid": layer(nn.Hardsigmoid),
    "softmax": sequence(lambda m, x: x.softmax(-1)),
    "max_pool": layer(lambda: nn.MaxPool2d(2)),
    "reshape": row(lambda m, x: x.transpose(2, 3)),
    "dropout": layer(nn.Dropout),
    "identity": layer(nn.Identity),
    "slice": row(lambda m, x: x[:, :, 2:]),
    "pad": row(lambda m, x: F.pad(x, (1, 1))),
    "interpolate": layer(lambda: nn.Upsample(scale_factor=2)),
    "batch_norm": row(lambda m, x: m(x + x.flip(1)), lambda: nn.BatchNorm2d(WIDTH)),
    "layer_norm": layer(lambda: nn.LayerNorm(WIDTH), rank=3),
    "group_norm": layer(lambda: nn.GroupNorm(2, WIDTH)),
    "rms_norm": layer(lambda: nn.RMSNorm(WIDTH), rank=3),
    "silu": layer(nn.SiLU),
    "gelu": layer(nn.GELU),
    "hardswish": layer(nn.Hardswish),
    "tanh": layer(nn.Tanh),
    "mean": sequence(lambda m, x: x - x.mean(-1, keepdim=True)),
    "embedding": Words,
    "attention": sequence(
        lambda m, x: m(x, x, x)[0],
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True),
    ),
    "input": layer(nn.Identity),
    "constant": row(lambda m, x: x + m.weight.view(1, -1, 1, 1), lambda: nn.PReLU(WIDTH)),
    "cast": sequence(lambda m, x: x * (x > 0).long().to(torch.int32)),
    "size": sequence(lambda m, x: x * x.size(0)),
}

LENT = {
    **{f"{n}_like": lambda x, n=n: getattr(torch, f"{n}_like")(x) for n in ("zeros", "ones")},
    **{f"{n}_like": lambda x, n=n: getattr(torch, f"{n}_like")(x) * 0 for n in ("rand", "randn")},
    "empty_like": lambda x: torch.empty_like(x).zero_(),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "randint_like": lambda x: torch.randint_like(x, 1),
    **{f"new_{n}": lambda x, n=n: getattr(x, f"new_{n}")(4) for n in ("zeros", "ones")},
    "new_empty": lambda x: x.new_empty(4).zero_(),
    "new_full": lambda x: x.new_full((4,), 2.0),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "arange": lambda x: torch.arange(x.size(0)).view(-1, 1, 1),
    **{n: lambda x, n=n: getattr(torch, n)(x.size(0), 1, 4) for n in ("zeros", "ones")},
    **{n: lambda x, n=n: getattr(torch, n)(x.size(0), 1, 4) * 0 for n in ("rand", "randn")},
    "empty": lambda x: torch.empty(x.size(0), 1, 4).zero_(),
    "full": lambda x: torch.full((x.size(0), 1, 4), 2.0),
    "eye": lambda x: torch.eye(x.size(0), 4)[:, None],
    "linspace": lambda x: torch.linspace(0, 1, x.size(0)).view(-1, 1, 1),
    "randint": lambda x: torch.randint(1, (x.size(0), 1, 4)),
    "tensor": lambda x: torch.tensor(x.size(0)),
}
"""What takes a size or a dtype of a tensor: none changes what it is added to at random."""

STEPS = {
    **{n: lambda x, n=n: getattr(torch, n)(x) for n in ("round", "floor", "ceil", "trunc", "fix")},
    **{n: lambda x, n=n: getattr(torch, n)(x) for n in ("sign", "sgn")},
    **{n: lambda x, n=n: getattr(x.clone(), n)() for n in ("round_", "floor_", "ceil_", "trunc_")},
    "sign_": lambda x: x.clone().sign_(),
    "heaviside": lambda x: torch.heaviside(x, x),
    "floordiv": lambda x: x // 2,
    "mod": lambda x: x % 2,
    **{n: lambda x, n=n: getattr(torch, n)(x, 2) for n in ("floor_divide", "remainder", "fmod")},
    "floor_divide_": lambda x: x.clone().floor_divide_(2),
    **{n: lambda x, n=n: getattr(x.clone(), n)(2) for n in ("remainder_", "fmod_")},
}
ALIKE = {"lent": LENT, "steps": STEPS}
"""Rows of the table that are alike: one model runs all of them."""


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does, and calls what it inherits."""

    def forward(self, input):
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class OnlySuper(nn.Linear):
    def forward(self, input):
        return super().forward(input)


class Standardised(nn.Conv2d):
    def forward(self, input):
        mean, var = (f(self.weight, (1, 2, 3), keepdim=True) for f in (torch.mean, torch.var))
        weight = (self.weight - mean) / (var + 1e-5).sqrt()
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class LowRank(nn.Linear):
    """Adds a product of two small matrices, as fine-tuning does."""

    def __init__(self, width):
        super().__init__(width, width)
        self.down, self.up = (
            nn.Parameter(torch.randn(2, width)),
            nn.Parameter(torch.randn(width, 2)),
        )

    def forward(self, input):
        return super().forward(input) + 0.5 * F.linear(F.linear(input, self.down), self.up)


class Merged(LowRank):
    """The same in one product, with a weight that is computed."""

    def forward(self, input):
        return F.linear(input, self.weight + self.up @ self.down, self.bias)


class Turned(nn.ConvTranspose2d):
    def forward(self, input, output_size=None):
        return F.conv_transpose2d(input, self.weight, self.bias, self.stride)


class Deciding(nn.Linear):
    """Looks at values, so that it cannot be traced."""

    def forward(self, input):
        return super().forward(input) if input.sum() < 1e9 else input


class DecidingConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) if input.sum() < 1e9 else input


class Rows(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 3.0


class Experts(nn.Module):
    """Sends every sample to one of its layers, one after the other, and is left whole."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.experts = nn.ModuleList(kind(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, 1)
        choice, result = rows[:, 0] > 0, torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            chosen = choice.eq(bool(i)).nonzero()[:, 0]
            if len(chosen):
                result = result.index_put((chosen,), expert(expert(rows[chosen])))
        return (result @ result.T @ result).view(x.shape)


def scaled_part(m, x):
    part = x[:, 1:3]
    part.mul_(0.5)
    return m(x)


def set_part(m, x):
    part = x[:, 1:3]
    part[:, 0] = 3.0
    return m(x)


def scaled_transposed(m, x):
    x.transpose(1, 2).mul_(0.5)
    return m(x)


def overwritten(m, x):
    x[:, 0] = 3.0
    x.clamp_(0.0, 1.0)
    m(x)
    return x


def scripted():
    with warnings.catch_warnings(action="ignore"):  # on its way out, and still in use
        return torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))


def recurrent(kind, **options):
    return sequence(lambda m, x: m(x)[0], lambda: kind(WIDTH, WIDTH, batch_first=True, **options))


FORMS = {
    "conv_same": layer(lambda: nn.Sequential(SameConv(WIDTH, WIDTH, 2), nn.BatchNorm2d(WIDTH))),
    "conv_same_strided": layer(lambda: SameConv(WIDTH, WIDTH, 3, 2, padding="valid")),
    "conv_standardised": layer(
        lambda: nn.Sequential(Standardised(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH))
    ),
    "conv_turned": layer(lambda: nn.Sequential(Turned(WIDTH, WIDTH, 2), nn.BatchNorm2d(WIDTH))),
    "linear_super": layer(lambda: OnlySuper(WIDTH, WIDTH), rank=3),
    "linear_low_rank": layer(lambda: LowRank(WIDTH), rank=3),
    "linear_merged": layer(lambda: Merged(WIDTH), rank=3),
    "linear_deciding": layer(lambda: Deciding(WIDTH, WIDTH), rank=3),
    "conv_deciding": layer(
        lambda: nn.Sequential(DecidingConv(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH))
    ),
    "experts": layer(Experts, rank=3),
    "experts_deciding": layer(lambda: Experts(Deciding), rank=3),
    "scripted": layer(scripted, rank=3),
    "lstm": recurrent(nn.LSTM),
    "lstm_both_ways": sequence(
        lambda m, x: m(x)[0][:, :, :WIDTH],
        lambda: nn.LSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True),
    ),
    "gru": recurrent(nn.GRU),
    "rnn": recurrent(nn.RNN),
    "lstm_cell": sequence(lambda m, x: m(x[:, 0])[1], lambda: nn.LSTMCell(WIDTH, WIDTH)),
    "gru_cell": sequence(lambda m, x: m(x[:, 0]), lambda: nn.GRUCell(WIDTH, WIDTH)),
    "attention_states": sequence(
        lambda m, x: m(x, x, x)[0], lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    ),
    "bilinear": sequence(lambda m, x: m(x, x), lambda: nn.Bilinear(WIDTH, WIDTH, WIDTH)),
    "contraction": sequence(lambda m, x: torch.einsum("nid,njd->nij", x, x) @ x),
    "trilinear": sequence(lambda m, x: torch.einsum("nid,njd,njk->nik", x, x, x)),
    "baddbmm": sequence(lambda m, x: torch.baddbmm(x, x @ x.mT, x)),
    "addmm": sequence(
        lambda m, x: torch.addmm(x[:, 0], x[:, 1], m.weight), lambda: nn.Linear(4, 4)
    ),
    "addmm_data": sequence(lambda m, x: torch.addmm(x[:, 0], x[:, 1], x[0, :4])),
    "mm": sequence(lambda m, x: torch.mm(x[:, 1], x[0, :4])),
    "matmul_by_name": sequence(lambda m, x: torch.matmul(input=x, other=x.mT) @ x),
    "bmm": sequence(lambda m, x: torch.bmm(x, mat2=x.mT).bmm(x)),
    "matmul_parameter": sequence(lambda m, x: x @ m.weight, lambda: nn.Linear(4, 4)),
    "matmul_rows": sequence(lambda m, x: x @ x[0, :4].T),
    "mv": sequence(lambda m, x: x * (x @ x[0, 0])[..., None]),
    "add_twice": row(lambda m, x: torch.add(x, x.flip(1), alpha=2)),
    "mean_of_tokens": sequence(lambda m, x: x.mean(1)),
    "mean_of_images": row(lambda m, x: x.mean((2, 3), keepdim=True)),
    "mean_of_rows": row(lambda m, x: x.mean(2, keepdim=True)),
    "average_global": layer(lambda: nn.AdaptiveAvgPool2d(1)),
    "average_adaptive": layer(lambda: nn.AdaptiveAvgPool2d(2)),
    "largest": sequence(lambda m, x: x.max(1, keepdim=True)[0]),
    "top": sequence(lambda m, x: x.topk(2, 1).values),
    "written": sequence(lambda m, x: m(written(x)), lambda: nn.Linear(WIDTH, WIDTH)),
    "conv_dynamic": row(
        lambda m, x: F.conv2d(x, x.mean((0, 2, 3)).view(1, 4, 1, 1).expand(4, 4, 1, 1))
    ),
    "conv_functional": row(
        lambda m, x: F.conv_transpose2d(x, m.weight, stride=2), lambda: nn.Conv2d(4, 4, 2)
    ),
    "sdpa": sequence(lambda m, x: F.scaled_dot_product_attention(x, x, x)),
    "gelu_of_sum": sequence(lambda m, x: F.gelu(x + x.flip(1))),
    "scaled_part": sequence(scaled_part, lambda: nn.Linear(WIDTH, WIDTH)),
    "set_part": sequence(set_part, lambda: nn.Linear(WIDTH, WIDTH)),
    "scaled_transposed": sequence(scaled_transposed, lambda: nn.Linear(WIDTH, WIDTH)),
    "overwritten": sequence(overwritten, lambda: nn.ReLU(inplace=True)),
    "class_token": sequence(
        lambda m, x: torch.cat([m.bias.expand(len(x), 1, -1), x], 1), lambda: nn.Linear(4, 4)
    ),
    "padded_with_ones": row(lambda m, x: F.pad(x, (1, 1), value=1.0)),
    "scaled_rows": lambda: Words(Rows),
    "lent": sequence(lambda m, x: sum([x + f(x) for f in LENT.values()])),
    "steps": sequence(lambda m, x: sum([f(x.softmax(-1)) + x for f in STEPS.values()])),
}


def written(x):
    y = torch.zeros(len(x), 5, WIDTH)
    y[:, :3] = x[:, :3]
    return y


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        return self.one(x) if x.sum() < 1e9 else self.other(x)


class Beside(nn.Module):
    """Several models that read the same input; their outputs stand beside one another."""

    def __init__(self, names):
        super().__init__()
        parts = {name: {**ROWS, **FORMS}[name]() for name in names}
        self.parts = nn.ModuleDict({f"_{name}": m for name, m in parts.items()})
        self.rank = next(iter(parts.values())).rank

    def forward(self, x):
        return torch.cat([m(x).flatten(1) for m in self.parts.values()], 1)


def example(model):
    if isinstance(model, Words):
        return torch.randint(0, 7, (4, 5))
    return torch.randn(4, *{3: (5, WIDTH), 4: (WIDTH, 6, 6), 5: (WIDTH, 4, 4, 4)}[model.rank])


LONG = {
    *("rnn", "lstm_both_ways", "gru_cell", "experts_deciding", "mean_of_rows", "bmm", "sdpa"),
    *("average_adaptive", "conv_same_strided", "addmm_data", "gelu_of_sum", "largest"),
}
"""Close relatives of others."""


def test_every_operation_of_the_table_has_a_row_here():
    assert {*ROWS, *LENT, *STEPS} == set(OPS)
    for name, rows in ALIKE.items():
        model = FORMS[name]().eval()
        captured = capture(model, example(model))
        modules = dict(captured.named_modules())
        assert {*rows} <= {op_name(n, modules) for n in captured.graphs["eval"].nodes}


def test_a_batch_norm_behind_a_subclass_is_folded_where_its_layer_is_known():
    norms = {}
    for name in ("conv_same", "conv_turned", "conv_standardised", "conv_deciding"):
        model = FORMS[name]().eval()
        plan = make_plan(capture(model, example(model)), make_scheme())
        norms[name] = {w.batch_norm for w in plan.weights.values()} - {None}
        listed = [f for f in plan.floats if f.op == "batch_norm"]
        assert bool(listed) != bool(norms[name])
    expected = {"conv_same": {"module.1"}, "conv_turned": {"module.1"}}
    assert {k: v for k, v in norms.items() if v} == expected


def test_states_saved_when_such_a_layer_was_a_module_of_its_own_come_back():
    model, twin = Beside(("conv_same",)).eval(), Beside(("conv_same",)).eval()
    x = example(model)
    captured, *_ = planned(model, x)
    state = {k.replace("views.parts/_conv_same/module/0.", "parts._conv_same.module.0."): v
             for k, v in captured.state_dict().items()}  # fmt: skip
    assert state.keys() != captured.state_dict().keys()
    again, *_ = planned(twin, torch.rand_like(x))
    again.load_state_dict(state)
    assert torch.equal(again(x), captured(x))


@pytest.mark.parametrize("form", ["overwritten", "scaled_part", "set_part", "scaled_transposed"])
def test_what_is_written_into_a_tensor_is_not_lost_on_the_way_to_integers(form):
    model = FORMS[form]().eval()
    x = example(model)
    captured, *_ = planned(model, x)
    expected = captured(x)
    for run in (IntegerRun(captured), IntegerRun(convert(captured))):
        torch.testing.assert_close(run(x), expected)


def test_experts_that_the_example_did_not_reach_are_listed():
    plan = make_plan(capture(layer(Unreached)(), torch.randn(2, WIDTH, 3, 3)), make_scheme())
    assert [(f.name, f.macs, f.reason) for f in plan.floats] == [
        ("module", 0, "no integer form for this operation"),
        ("module.other", 0, "the example did not reach it"),
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in [*ROWS, *FORMS]]
)
def test_what_the_plan_calls_float_runs_in_float(name):
    torch.manual_seed(0)
    model = {**ROWS, **FORMS}[name]().eval()
    x = example(model)
    assert_true(*planned(model, x), x)


ROUTES = {
    "groups": make_scheme(4, 8, weight={"group_size": 2}),
    "wide": make_scheme(8, 12),
    "wide_weights": make_scheme(12, 8),
    "weights_alone": make_scheme(rules={"off": Rule("*", None, "float")}),
    "rows": make_scheme(8, 8, activation={"quantizer": "dynamic", "symmetric": True}),
    "tensors": make_scheme(
        8, 8, activation={"quantizer": "dynamic_tensor", "signed": False, "symmetric": False}
    ),
}


@pytest.mark.parametrize("scheme", ROUTES)
@pytest.mark.parametrize("names", [("linear", "matmul", "experts"), ("conv2d", "average_global")])
def test_so_it_is_with_formats_that_have_no_integer_kernels(names, scheme):
    torch.manual_seed(0)
    model = Beside(names).eval()
    x = example(model)
    assert_true(*planned(model, x, ROUTES[scheme]), x)


TOKENS = ("linear_super", "linear_low_rank", "linear_merged", "contraction", "lstm")
IMAGES = ("conv_same", "conv_standardised", "conv_turned")


@pytest.mark.parametrize("names", [pytest.param(TOKENS, marks=pytest.mark.slow), IMAGES])
def test_so_it_is_in_the_file(names, tmp_path):
    torch.manual_seed(0)
    model = Beside(names).eval()
    x = example(model)
    captured, plan, nodes = planned(model, x)
    counts = assert_true(captured, plan, nodes, x)
    export_onnx(convert(captured), x[:2], tmp_path / "model.onnx")
    assert count_file(tmp_path / "model.onnx", {"input": x.numpy()}) == counts


@pytest.mark.parametrize(
    "drop",
    [
        nn.Dropout(inplace=True),
        nn.AlphaDropout(inplace=True),
        nn.Identity(),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("by_call", [False, True])
def test_dropout_in_place_of_a_view_changes_nothing(drop, by_call):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.linear = nn.Conv2d(3, 4, 3), drop, nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x).mean((2, 3)).flatten(1)
            x = F.dropout(x, 0.5, self.training, inplace=True) if by_call else self.drop(x)
            return self.linear(x)

    x = torch.randn(2, 3, 6, 6)
    captured, plan, names = planned(Head().eval(), x)
    assert plan.float_share == 0
    assert assert_true(captured, plan, names, x)[1] == 0

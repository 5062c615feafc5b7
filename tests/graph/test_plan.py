import json
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from qat.errors import GraphError, SpecError
from qat.fake_quant import FakeQuant
from qat.graph.insert import prepare
from qat.graph.lint import lint
from qat.graph.plan import Plan
from qat.graph.planner import make_plan
from qat.graph.table import plan_table
from qat.graph.targets import TARGETS
from qat.graph.trace import capture
from qat.models import build
from qat.spec import FLOAT, Rule
from tests.helpers import WEIGHT, make_scheme


def plan_of(model, shape, scheme=None) -> Plan:
    return make_plan(capture(model, torch.randn(2, *shape)), scheme or make_scheme())


def net(**modules):
    """A chain of named modules."""
    result = nn.Sequential()
    for name, module in modules.items():
        result.add_module(name, module)
    return result


def conv_net():
    return net(
        a=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        b=nn.Conv2d(4, 6, 3, padding=1),
        relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(6, 5),
    )


ENDS = {"ends": Rule("@first|@last", {"bits": 8}, {"bits": 8})}


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    captured = capture(model, torch.randn(2, 3, 64, 64))
    return model, captured, make_plan(captured, make_scheme(4, 4, rules=ENDS))


def test_resnet18_has_a_weight_site_for_every_layer(resnet18):
    model, _, plan = resnet18
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(plan.weights) == sorted(layers)
    assert len(layers) == 21
    assert [w.batch_norm for w in plan.weights.values()].count(None) == 1  # fc
    assert plan.weights["layer2.0.downsample.0"].batch_norm == "layer2.0.downsample.1"
    assert plan.weights["layer1.0.conv2"].batch_norm == "layer1.0.bn2"
    assert len(plan.batch_norms) == 20
    assert all(w.batch_norm_mode == "late" for w in plan.weights.values())
    assert plan.float_share == 0


def test_resnet18_has_one_activation_site_for_every_tensor(resnet18):
    _, _, plan = resnet18
    expected = {"input.x", "relu", "avgpool"}
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            expected |= {f"{prefix}.relu", f"{prefix}.bn2", f"{prefix}.relu_2"}
        if stage > 1:
            expected.add(f"layer{stage}.0.downsample.1")
    assert set(plan.activations) == expected  # no maxpool, flatten, add, conv, bn1
    assert len(plan.activations) == 30


def test_resnet18_signs(resnet18):
    _, _, plan = resnet18
    signed = {name for name, site in plan.activations.items() if site.format.spec.signed}
    negative = {n for n in plan.activations if n.endswith(("bn2", "downsample.1"))}
    assert signed == negative | {"input.x"}


def test_resnet18_layers_read_the_sites_in_front(resnet18):
    _, _, plan = resnet18
    sources = {name: w.source for name, w in plan.weights.items()}
    assert sources["conv1"] == "input.x"
    assert sources["layer1.0.conv1"] == "relu"  # through the max-pool
    assert sources["layer1.0.conv2"] == "layer1.0.relu"
    assert sources["layer2.0.conv1"] == sources["layer2.0.downsample.0"] == "layer1.1.relu_2"
    assert sources["fc"] == "avgpool"  # through the flatten


def test_resnet18_first_and_last_are_wide(resnet18):
    _, _, plan = resnet18
    wide = {name for name, w in plan.weights.items() if w.format.spec.bits == 8}
    assert wide == {"conv1", "fc"}
    assert {w.format.spec.bits for w in plan.weights.values()} == {4, 8}
    wide = {name for name, a in plan.activations.items() if a.format.spec.bits == 8}
    assert wide == {"input.x", "avgpool"}


def test_no_site_between_a_convolution_and_its_relu(resnet18):
    _, captured, plan = resnet18
    modules = dict(captured.named_modules())
    for mode, placed in plan.placements.items():
        nodes = {n.name: n for n in captured.graphs[mode].nodes}
        assert set(placed.values()) == set(plan.activations)
        for name in placed:
            users = [modules.get(str(u.target)) for u in nodes[name].users]
            assert not any(isinstance(m, nn.ReLU | nn.BatchNorm2d) for m in users)


def test_both_operands_of_an_add_are_quantized(resnet18):
    _, captured, plan = resnet18
    adds = [n for n in captured.graphs["eval"].nodes if "add" in n.name]
    placed = plan.placements["eval"]
    assert len(adds) == 8
    for add in adds:
        names = {n.name if n.name in placed else n.all_input_nodes[0].name for n in add.args}
        assert names <= set(placed)


def test_maxpool_keeps_what_it_reads():
    model = net(
        conv=nn.Conv2d(3, 4, 3), pool=nn.MaxPool2d(2), flat=nn.Flatten(), fc=nn.Linear(36, 2)
    )
    plan = plan_of(model, (3, 8, 8))
    assert set(plan.activations) == {"input.input", "conv"}
    assert plan.activations["conv"].format.spec.signed


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.end = nn.Conv2d(9, 5, 1)

    def forward(self, x):
        return self.end(torch.cat([self.relu(self.a(x)), self.b(x), self.pool(x)], 1))


def test_a_concatenation_has_one_scale_on_all_its_branches():
    captured, plan = prepare(Concat(), make_scheme(), torch.randn(2, 3, 8, 8))
    assert set(plan.activations) == {"concat"}  # the input itself is one of the branches
    assert plan.activations["concat"].format.spec.signed
    calls = [n for n in captured.graphs["eval"].nodes if str(n.target) == "activations.concat"]
    assert {n.args[0].name for n in calls} == {"relu", "b", "x"}
    assert len([m for m in captured.modules() if isinstance(m, FakeQuant)]) == 4  # 3 weights
    assert {w.source for w in plan.weights.values()} == {"concat"}


def test_shufflenet_shares_scales_through_split_and_shuffle():
    torch.manual_seed(0)
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    plan = plan_of(model, (3, 32, 32))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(plan.weights) == sorted(layers)
    assert plan.float_share == 0
    assert all(w.source is not None for w in plan.weights.values())
    # one scale for a whole stage, and two more for every block: within its branches
    stage = [n for n in plan.activations if n.startswith("stage2.")]
    inner = {f"stage2.{i}.branch2.{j}" for i in range(4) for j in (2, 4)} | {"stage2.0.branch1.1"}
    assert len(set(stage) - inner) == 1
    assert inner < set(stage)


def test_reshapes_by_the_same_size_do_not_join_tensors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
            self.c, self.d = nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            n = x.size(0)
            a, b = self.a(x).view(n, -1), self.b(x).view(n, -1)
            rows, _ = x.shape
            return self.c(a.reshape(rows, 6)) + self.d(b.reshape(rows, 6))

    plan = plan_of(Model(), (4,))
    assert set(plan.activations) == {"input.x", "a", "b"}
    assert plan.weights["c"].source == "a"
    assert plan.weights["d"].source == "b"


def test_depthwise_and_transposed_axes():
    model = net(
        dw=nn.Conv2d(4, 4, 3, groups=4),
        up=nn.ConvTranspose2d(4, 6, 2, stride=2),
        grouped=nn.ConvTranspose1d(6, 4, 2, groups=2),
    )
    plan = plan_of(net(dw=model.dw, up=model.up), (4, 8, 8))
    assert plan.weights["dw"].format.spec.axis == 0
    assert plan.weights["dw"].format.spec.scale_shape(plan.weights["dw"].shape) == (4, 1, 1, 1)
    assert plan.weights["up"].format.spec.axis == 1
    assert plan.weights["up"].format.spec.scale_shape(plan.weights["up"].shape) == (1, 6, 1, 1)


def test_later_rules_win_field_by_field():
    rules = {
        "convs": Rule("@conv2d", {"bits": 6, "power_of_two": True}),
        "one": Rule("b|nothing", {"bits": 3}),
    }
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(8, 8, rules=rules))
    bits = {n: w.format.spec.bits for n, w in plan.weights.items()}
    assert bits == {"a": 6, "b": 3, "fc": 8}
    shift = {n: w.format.spec.power_of_two for n, w in plan.weights.items()}
    assert shift == {"a": True, "b": True, "fc": False}
    assert all(w.format.spec.narrow for w in plan.weights.values())
    swapped = dict(reversed(rules.items()))
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(8, 8, rules=swapped))
    assert plan.weights["b"].format.spec.bits == 6


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("@input", {"input.input"}),
        ("@first", {"input.input"}),
        ("@last", {"pool"}),
        ("@to:conv2d", {"input.input", "relu"}),
        ("@to:average_pool", {"relu2"}),
        ("@average_pool", {"pool"}),
        ("@relu", {"relu", "relu2"}),
        ("relu*", {"relu", "relu2"}),
        ("@to:linear | @input", {"pool", "input.input"}),
    ],
)
def test_patterns_and_tags_of_activations(match, expected):
    scheme = make_scheme(rules={"some": Rule(match, None, {"bits": 5})})
    plan = plan_of(conv_net(), (3, 8, 8), scheme)
    assert {n for n, a in plan.activations.items() if a.format.spec.bits == 5} == expected


def test_one_layer_is_first_and_last():
    plan = plan_of(net(fc=nn.Linear(4, 2)), (4,), make_scheme(4, 4, rules=ENDS))
    assert plan.weights["fc"].format.spec.bits == 8
    first = {"one": Rule("@first", {"bits": 5})}
    plan = plan_of(net(fc=nn.Linear(4, 2)), (4,), make_scheme(4, 4, rules=first))
    assert plan.weights["fc"].format.spec.bits == 5


def test_a_rule_that_matches_nothing_is_an_error_with_close_names():
    rules = {"typo": Rule("relu3", None, {"bits": 4})}
    with pytest.raises(GraphError, match=r"rule 'typo'.*'relu3'.*relu2"):
        plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules))
    with pytest.raises(GraphError, match="rule 'tag'"):
        plan_of(conv_net(), (3, 8, 8), make_scheme(rules={"tag": Rule("@conv_transpose2d")}))


@pytest.mark.parametrize(
    ("rules", "idle"),
    [
        ({"mine": Rule("b", {"bits": 4})}, []),
        ({"mine": Rule("@first|@last", {"bits": 8})}, []),  # says what the first rule says
        ({"mine": Rule("*", {"bits": 4})}, [("body", "weight bits=8 .* as mine wins")]),
        ({"mine": Rule("a", {"bits": 4}), "b": Rule("a", {"bits": 4})}, []),
        (
            {"mine": Rule("a|b", {"bits": 4}), "x": Rule("a", {"bits": 3}), "y": Rule("b", FLOAT)},
            [("mine", "weight bits=4 .* as x, y wins")],
        ),
        (
            {"mine": Rule("b", "float"), "two": Rule("b", {**WEIGHT, "bits": 4})},
            [("mine", "weight float has no effect, as two wins")],
        ),
        ({"mine": Rule("@to:add|relu2", {"bits": 4})}, [("mine", "the rule matches no weight")]),
        ({"mine": Rule("b", None, {"bits": 4})}, [("mine", "the rule matches no activation")]),
        ({"mine": Rule("@to:add|relu2", {"bits": 4}, optional=True)}, []),
    ],
)  # fmt: skip
def test_what_rules_say_in_vain_is_told(rules, idle):
    found = plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules)).idle
    assert [name for name, _ in found] == [name for name, _ in idle]
    for (_, message), (_, expected) in zip(found, idle, strict=True):
        assert re.search(expected, message), message
    plan = Plan("test", idle=found)
    assert [f.site for f in lint(plan, TARGETS["generic"])] == [f"rule {name}" for name, _ in idle]


def test_formats_that_do_not_fit_name_their_site():
    with pytest.raises(SpecError, match=r"layer 'a'.*group_size.*got 2"):
        plan_of(conv_net(), (3, 8, 8), make_scheme(weight={"group_size": 2}))
    with pytest.raises(SpecError, match=r"bits.*'relu2'.*got 0"):
        Rule("relu2", None, {"bits": 0})
    scheme = make_scheme(rules={"axis": Rule("relu", None, {"axis": 1})})
    with pytest.raises(SpecError, match=r"'relu'.*axis"):
        plan_of(conv_net(), (3, 8, 8), scheme)
    with pytest.raises(SpecError, match=r"observer.*got null"):
        plan_of(conv_net(), (3, 8, 8), make_scheme(weight={"observer": None}))


# a: 8*8*4*27, b: 8*8*6*36, fc: 6*5
MACS_A, MACS_B, MACS_FC = 6912, 13824, 30


def test_float_layers_are_listed_with_their_share():
    rules = {"skip": Rule("b", "float", None)}
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules))
    assert set(plan.weights) == {"a", "fc"}
    assert plan.macs == MACS_A + MACS_B + MACS_FC
    (listed,) = plan.floats
    assert (listed.name, listed.op, listed.macs) == ("b", "conv2d", MACS_B)
    assert "scheme" in listed.reason
    assert plan.float_share == MACS_B / plan.macs
    assert {n: w.macs for n, w in plan.weights.items()} == {"a": MACS_A, "fc": MACS_FC}


def test_layers_that_read_float_count_as_float():
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(rules={"in": Rule("@input", None, "float")}))
    assert [(f.name, f.macs, f.reason) for f in plan.floats] == [
        ("a", MACS_A, "an input stays float")
    ]
    assert plan.weights["a"].source is None
    assert plan.float_share == MACS_A / plan.macs


def test_float_and_back_takes_the_fields_of_the_later_rule_only():
    rules = {"off": Rule("b", "float"), "on": Rule("b", {"bits": 4})}
    with pytest.raises(SpecError, match="no quantizer, observer"):
        plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules))


def test_multiply_accumulates_of_resnet20():
    plan = plan_of(build("resnet20", 10), (3, 32, 32))
    stem, fc = 3 * 16 * 9 * 32**2, 64 * 10
    same = 16 * 16 * 9 * 32**2  # also 32*32*9*16**2 and 64*64*9*8**2
    assert plan.macs == stem + 6 * same + 2 * (same // 2 + 5 * same) + fc == 40_551_040
    assert plan.float_share == 0
    assert not plan.floats


@pytest.mark.parametrize(
    "weight",
    [
        {"power_of_two": True},
        {"symmetric": False},
        {"narrow": False},
        {"signed": False, "narrow": False},
    ],
)
def test_formats_that_cannot_move_a_batch_norm_are_folded_from_the_start(weight):
    rules = {"one": Rule("b", weight)}
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules))
    assert plan.weights["a"].batch_norm_mode == "late"
    assert plan.weights["b"].batch_norm_mode == "folded"


class Net(nn.Module):
    """Modules a, b, bn, ... and a forward given as a function."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def twice(m, x):
    return m.c(m.b(m.a(m.a(x))))


def used_besides(m, x):
    y = m.a(x)
    return m.b(m.bn(y) + y)


def norm_twice(m, x):
    return m.b(m.bn(m.bn(m.a(x))))


def aux_reads_the_convolution(m, x):
    y = m.a(x)
    if m.training:
        return m.b(m.bn(y)), y
    return m.b(m.bn(y))


def eval_reads_the_convolution(m, x):
    y = m.a(x)
    z = m.b(m.bn(y))
    return z if m.training else z + y


def test_a_layer_called_twice_has_one_weight_site():
    model = Net(twice, a=nn.Linear(4, 4), b=nn.BatchNorm1d(4), c=nn.Linear(4, 2))
    captured, plan = prepare(model, make_scheme(), torch.randn(4, 4))
    assert set(plan.weights) == {"a", "c"}
    assert plan.weights["a"].batch_norm is None
    assert plan.weights["a"].source is None  # two inputs, two scales
    assert set(plan.activations) == {"input.x", "a", "a_2", "b"}  # the norm cannot be folded
    assert len([n for n, m in captured.named_modules() if n.endswith("weight_quant")]) == 2


def test_a_relu_called_twice_has_two_sites():
    model = Net(lambda m, x: m.c(m.r(m.b(m.r(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
                c=nn.Linear(4, 4), r=nn.ReLU())  # fmt: skip
    plan = plan_of(model, (4,))
    assert {n for n in plan.activations if n.startswith("r")} == {"r", "r_2"}


@pytest.mark.parametrize(
    "forward",
    [used_besides, norm_twice, aux_reads_the_convolution, eval_reads_the_convolution],
    ids=lambda f: f.__name__,
)
def test_batch_norms_that_cannot_be_folded(forward):
    model = Net(forward, a=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), b=nn.Conv2d(4, 4, 1))
    plan = plan_of(model, (4, 4, 4))
    assert plan.weights["a"].batch_norm is None
    assert plan.batch_norms == ["bn"]


def test_linear_in_front_of_batch_norm():
    plan = plan_of(net(fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), end=nn.Linear(6, 2)), (4,))
    assert plan.weights["fc"].batch_norm == "bn"
    assert set(plan.activations) == {"input.input", "bn"}
    # over a sequence the batch-norm's channels are not the layer's
    plan = plan_of(net(fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(5), end=nn.Linear(6, 2)), (5, 4))
    assert plan.weights["fc"].batch_norm is None


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), nn.GroupNorm(2, 4)])
def test_norms_without_statistics_stay_float(norm):
    plan = plan_of(net(a=nn.Conv2d(3, 4, 1), bn=norm, b=nn.Conv2d(4, 4, 1)), (3, 4, 4))
    assert plan.weights["a"].batch_norm is None
    assert plan.batch_norms == []
    assert [f.name for f in plan.floats] == ["bn"]


def test_a_batch_norm_without_a_layer_in_front_stays_and_is_listed():
    def dense(m, x):  # as in densenet: norm, relu, conv on a concatenation
        y = m.a(F.relu(m.bn(x)))
        return m.b(F.relu(m.bn2(torch.cat([x, y], 1))))

    model = Net(dense, bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 2, 1), bn2=nn.BatchNorm2d(6),
                b=nn.Conv2d(6, 4, 1))  # fmt: skip
    plan = plan_of(model, (4, 4, 4))
    assert plan.batch_norms == ["bn", "bn2"]
    assert [(f.name, f.op) for f in plan.floats] == [("bn", "batch_norm"), ("bn2", "batch_norm")]
    assert "no integer form" in plan.floats[0].reason
    assert {w.batch_norm for w in plan.weights.values()} == {None}
    assert set(plan.activations) == {"concat", "relu", "relu_2"}


def head_last(m, x):
    y = m.b(m.a(x))
    return (y, m.aux(y)) if m.training else y


class Nothing(nn.Sequential):
    """An empty container under a name of its own."""


@pytest.mark.parametrize(
    "shortcut",
    [
        nn.Sequential(),
        nn.Sequential(nn.Sequential(), nn.Identity()),
        Nothing(),
        nn.Dropout(0.0),
        nn.AlphaDropout(0.0),
        Net(lambda _, x: +x.data.cpu()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_does_nothing_has_no_site(shortcut):
    def residual(m, x):
        x = m.r(m.a(x))
        return m.c(m.r(m.b(x) + m.shortcut(x)))

    layers = {n: nn.Linear(4, 4) for n in ("a", "b", "c")}
    plan = plan_of(Net(residual, r=nn.ReLU(), shortcut=shortcut, **layers), (4,))
    assert set(plan.activations) == {"input.x", "r", "b", "r_2"}
    assert not plan.floats


def test_what_only_training_runs_decides_nothing():
    layers = {n: nn.Linear(4, 4) for n in ("a", "b", "aux")}
    plan = plan_of(Net(head_last, **layers), (4,), make_scheme(4, 4, rules=ENDS))
    assert set(plan.weights) == {"a", "b"}
    assert plan.weights["b"].format.spec.bits == 8  # last, though not in training
    assert plan.macs == 2 * 16


def noisy(m, x):
    if m.training:
        x = x + torch.ones(())
    return m.b(m.a(x) + x)


def functional_head(m, x):
    x = F.relu(m.a(x))
    aux = F.relu(m.aux(x)) if m.training else None
    x = m.c(F.relu(m.b(x)))
    return x if aux is None else (x, aux)


@pytest.mark.parametrize("forward", [noisy, functional_head], ids=lambda f: f.__name__)
def test_functions_of_training_alone_do_not_shift_the_names(forward):
    layers = {n: nn.Linear(4, 4) for n in ("a", "b", "c", "aux")}
    captured = capture(Net(forward, **layers), torch.randn(2, 4))
    plan = make_plan(captured, make_scheme())

    def readers(mode):
        """Site to the layers that read it."""
        nodes = {n.name: n for n in captured.graphs[mode].nodes}
        found: dict[str, set[str]] = {}
        for name, site in plan.placements[mode].items():
            names = {str(u.target) for u in nodes[name].users if u.op == "call_module"}
            found.setdefault(site, set()).update(names - {"aux"})
        return {site: names for site, names in found.items() if names}

    expected = readers("eval")
    assert len(expected) >= 2
    if forward is functional_head:
        assert readers("train") == expected
    else:  # the noisy input is another tensor than the input
        assert readers("train")["add"] == expected["add"] == {"b"}


def test_negative_multiples_are_signed():
    for forward in (
        lambda m, x: m.b(torch.add(m.r(x), m.r(m.a(x)), alpha=-1)),
        lambda m, x: m.b(m.r(m.a(x)) * -1),
        lambda m, x: m.b(m.r(m.a(x)) + -1.5),
        lambda m, x: m.b(m.r(m.a(x)).add(other=-1.5)),
    ):
        model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), r=nn.ReLU())
        plan = plan_of(model, (4,))
        assert plan.activations[str(plan.weights["b"].source)].format.spec.signed


def test_parametrized_layers_are_refused_by_name():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(GraphError, match="'fc'"):
        plan_of(net(fc=layer), (4,))


class Router(nn.Module):
    """Its control flow looks at values, so that it is left whole; what has run is planned."""

    def __init__(self):
        super().__init__()
        self.low, self.high, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x):
        return self.act(self.low(x) if x.mean() < 100 else self.high(x))


@pytest.mark.parametrize(
    ("rules", "source", "signed"),
    [
        ({}, "whole.low.input", True),
        ({"unsigned": Rule("whole.low.input", None, {"signed": False})}, "whole.low.input", False),
        ({"float": Rule("whole.low.input", None, "float")}, None, None),
    ],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_layers_of_a_module_that_is_left_whole(calls, rules, source, signed):
    model = Net(
        lambda m, x: m.end(m.whole(x) if calls == 1 else m.whole(m.whole(x))),
        whole=Router(),
        end=nn.Linear(6, 2),
    )
    plan = plan_of(model, (6,), make_scheme(4, 8, rules=rules))
    assert set(plan.weights) == {"whole.low", "end"}
    site = plan.weights["whole.low"]
    assert (site.op, site.shape, site.inner, site.source) == ("linear", (6, 6), True, source)
    assert site.macs == 36 * calls
    assert site.format.spec.bits == 4
    inner = {name: a for name, a in plan.activations.items() if name.startswith("whole.low")}
    assert [(a.op, a.format.spec.signed) for a in inner.values()] == (
        [] if source is None else [("leaf", signed)]
    )
    off = make_scheme(rules={"off": Rule("whole.low", "float")})
    assert "whole.low" not in plan_of(model, (6,), off).weights


def test_plan_is_plain_values(resnet18):
    _, _, plan = resnet18
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["float_share"] == 0
    assert values["weights"]["conv1"]["format"]["spec"]["bits"] == 8
    assert values["macs"] == plan.macs
    assert set(values["activations"]) == set(plan.activations)


def test_bytes_are_those_of_packed_codes_and_their_scales():
    rule = {"b": Rule("b", {"group_size": None})}
    scheme = make_scheme(3, 4, weight={"group_size": 2}, rules=rule)
    model = net(a=nn.Conv2d(4, 5, 3, bias=False), b=nn.Conv2d(5, 2, 1))
    plan = plan_of(model, (4, 8, 8), scheme)
    a, b = plan.weights["a"], plan.weights["b"]
    assert a.float_bytes == 4 * 5 * 4 * 9
    assert a.size_bytes == 68 + 4 * 5 * 2  # 180 codes of 3 bits: 540 bits; two groups a channel
    assert b.size_bytes == 4 + 4 * 2
    assert plan.activations["a"].float_bytes == 4 * 5 * 36  # of one sample
    assert plan.activations["a"].size_bytes == 5 * 36 // 2


def test_plan_changes_nothing(resnet18):
    model, captured, _ = resnet18
    assert not any(isinstance(m, FakeQuant) for m in captured.modules())
    assert list(captured.state_dict()) == list(model.state_dict())


def test_table_shows_every_site_and_the_totals():
    rules = {"skip": Rule("b", "float", None)}
    plan = plan_of(conv_net(), (3, 8, 8), make_scheme(rules=rules))
    text = plan_table(plan)
    for name in (*plan.weights, *plan.activations, "b", "the scheme leaves this layer in float"):
        assert name in text
    assert f"{plan.macs:,}" in text
    assert f"{plan.float_share:.2%}" in text

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from qat.codecs import ActivationCodec
from qat.errors import ExportError
from qat.fake_quant import FakeQuant
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.graph.op_names import op_name
from qat.graph.ops import OPS
from qat.integer_layers import ChannelAffine, IntegerLayer
from qat.reference.run import IntegerRun
from qat.spec import Rule
from tests.helpers import calibrate, folded, make_scheme, warm_up


def image_net(first, middle, norm, activation: type[nn.Module] = nn.ReLU):
    """Two layers with batch-norms, and a classifier."""
    return nn.Sequential(
        first, norm(8), activation(), middle, norm(8), activation(), nn.Flatten(), nn.LazyLinear(5)
    )


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


NETS = {
    "conv": lambda: (image_net(nn.Conv2d(4, 8, 3), conv(), nn.BatchNorm2d), (4, 8, 8)),
    "biasless": lambda: (
        image_net(nn.Conv2d(4, 8, 3, bias=False), conv(bias=False), nn.BatchNorm2d),
        (4, 8, 8),
    ),
    "depthwise": lambda: (
        image_net(nn.Conv2d(4, 8, 3), conv(groups=8, bias=False), nn.BatchNorm2d),
        (4, 8, 8),
    ),
    "grouped": lambda: (
        image_net(nn.Conv2d(4, 8, 3), conv(groups=2), nn.BatchNorm2d),
        (4, 8, 8),
    ),
    "transposed": lambda: (
        image_net(
            nn.ConvTranspose2d(4, 8, 2, stride=2, bias=False),
            nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4),
            nn.BatchNorm2d,
        ),
        (4, 4, 4),
    ),
    "conv1d": lambda: (
        image_net(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 8, 2), nn.BatchNorm1d),
        (4, 12),
    ),
    "conv3d": lambda: (image_net(nn.Conv3d(4, 8, 2), nn.Conv3d(8, 8, 1), nn.BatchNorm3d), (4,) * 4),
    "linear": lambda: (
        image_net(nn.Linear(4, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d),
        (4,),
    ),
    "plain_norm": lambda: (
        image_net(
            nn.Conv2d(4, 8, 3), conv(), lambda n: nn.BatchNorm2d(n, affine=False, eps=1e-2)
        ),
        (4, 8, 8),
    ),
    "relu6": lambda: (image_net(nn.Conv2d(4, 8, 3), conv(), nn.BatchNorm2d, nn.ReLU6), (4, 8, 8)),
    "norm_first": lambda: (
        image_net(
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3)), conv(), nn.BatchNorm2d
        ),
        (4, 8, 8),
    ),
    "signed": lambda: (
        image_net(nn.Conv2d(4, 8, 3), conv(), nn.BatchNorm2d, nn.Identity),
        (4, 8, 8),
    ),
}  # fmt: skip

FORMATS = {
    **{f"w{b}": {"bits": b} for b in (2, 3, 4, 5, 6, 7, 8, 16)},
    "tensor": {"bits": 4, "axis": None},
    "wide": {"bits": 4, "narrow": False},
    "affine": {"bits": 4, "symmetric": False, "narrow": False},
    "affine_unsigned": {"bits": 8, "symmetric": False, "signed": False, "narrow": False},
    "affine_tensor": {"bits": 6, "symmetric": False, "narrow": False, "axis": None},
    "shift": {"bits": 4, "power_of_two": True},
    "learned": {"bits": 4, "quantizer": "lsq", "observer": "mse"},
}


def make(net, *, seed=0):
    torch.manual_seed(seed)
    model, shape = NETS[net]()
    model.eval()(torch.randn(2, *shape))  # sizes of lazy layers
    return model, torch.randn(16, *shape)


def assert_converts_exactly(model, scheme, x):
    captured, plan = folded(warm_up(model, x), scheme, x)
    converted = convert(captured)
    other = torch.randn_like(x) * 2  # some of it outside the calibrated ranges
    with torch.no_grad():
        for batch in (x, other):
            assert torch.equal(captured(batch), converted(batch))
    return captured, plan, converted


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
@pytest.mark.parametrize("net", NETS)
def test_converted_is_the_fold_stage_for_every_layer(net, batch_norm):
    model, x = make(net)
    scheme = make_scheme(4, 8, batch_norm=batch_norm)
    _, plan, converted = assert_converts_exactly(model, scheme, x)
    layers = [m for m in converted.modules() if isinstance(m, IntegerLayer)]
    assert len(layers) == len(plan.weights) == 3
    assert all(m.weight_codes.dtype == torch.int8 for m in layers)
    biases = [m.bias_codes for m in layers]
    assert all(b is not None and b.dtype == torch.int32 for b in biases)
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert not norms
    assert not list(converted.parameters())


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
@pytest.mark.parametrize("net", ["conv", "transposed", "linear"])
@pytest.mark.parametrize("weight", FORMATS.values(), ids=FORMATS)
def test_converted_is_the_fold_stage_for_every_format(net, weight, batch_norm):
    model, x = make(net)
    assert_converts_exactly(model, make_scheme(8, 8, batch_norm=batch_norm, weight=weight), x)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"power_of_two": True}], ids=str)
def test_converted_is_the_fold_stage_for_every_activation(bits, options):
    model, x = make("conv")
    scheme = make_scheme(8, bits, activation=options)
    _, _, converted = assert_converts_exactly(model, scheme, x)
    codecs = [m for m in converted.modules() if isinstance(m, ActivationCodec)]
    kinds = {m.zero_point.dtype for m in codecs}
    assert kinds == {torch.uint8 if bits <= 8 else torch.uint16}


@pytest.mark.parametrize("batch_norm", ["late", "folded"])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_groups_of_inputs(group, batch_norm):
    model, x = make("conv")
    scheme = make_scheme(4, 8, batch_norm=batch_norm, weight={"group_size": group})
    _, _, converted = assert_converts_exactly(model, scheme, x)
    layer = converted.get_submodule("3")
    assert isinstance(layer, IntegerLayer)
    assert layer.weight_scale.shape == (8, 8 // group, 3, 3) or layer.block == group
    assert layer.bias_codes is None  # one accumulator, several scales


def test_weights_that_stay_float_and_inputs_that_stay_float():
    model, x = make("conv")
    rules = {"skip": Rule("3", "float", None), "in": Rule("@input", None, "float")}
    _, _, converted = assert_converts_exactly(model, make_scheme(rules=rules), x)
    # nothing to fold it into
    assert type(converted.get_submodule("4")) is ChannelAffine
    assert not isinstance(converted.get_submodule("3"), IntegerLayer)
    first = converted.get_submodule("0")
    assert isinstance(first, IntegerLayer)
    assert first.bias_codes is None


def test_integer_values_are_those_of_the_formats():
    model, x = make("conv")
    captured, plan = folded(warm_up(model, x), make_scheme(4, 4), x)
    converted = convert(captured)
    for name, site in plan.weights.items():
        layer = converted.get_submodule(name)
        assert isinstance(layer, IntegerLayer)
        gain = site.format.spec.storage_gain
        assert gain == 16
        codes = layer.weight_codes.int()
        assert (codes % gain == 0).all()
        assert (codes // gain).abs().max() == 7  # min-max ranges reach the last code
    seen: dict[str, torch.Tensor] = {}

    def keep(codec: Any, args: Any, y: torch.Tensor) -> None:
        seen[codec.site] = codec.codes(args[0]).int()

    for module in converted.modules():
        if isinstance(module, ActivationCodec):
            module.register_forward_hook(keep)
    converted(x)
    for name, codes in seen.items():
        spec = plan.activations[name].format.spec
        offset = 128 if spec.signed else 0
        assert codes.min() >= spec.qmin + offset
        assert codes.max() <= spec.qmax + offset


def test_conversion_leaves_the_trained_model_as_it_is():
    model, x = make("conv")
    captured, _ = folded(warm_up(model, x), make_scheme(4, 4), x)
    captured.train()
    before = {k: v.clone() for k, v in captured.state_dict().items()}
    graphs = {mode: str(g) for mode, g in captured.graphs.items()}
    converted = convert(captured)
    assert captured.training
    assert {mode: str(g) for mode, g in captured.graphs.items()} == graphs
    after = captured.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert not {t.data_ptr() for t in captured.state_dict().values() if t.numel()} & {
        t.data_ptr() for t in converted.state_dict().values() if t.numel()
    }
    captured(x).sum().backward()
    assert all(p.grad is not None for n, p in captured.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("ready", ["nothing", "calibrated"])
def test_models_that_are_not_ready_are_refused(ready):
    model, x = make("conv")
    captured, plan = prepare(model, make_scheme(), x)
    if ready == "calibrated":
        calibrate(captured, x)
    with pytest.raises(ExportError, match=r"fold stage.* '0'"):
        convert(captured)
    assert len(plan.weights) == 3


def test_a_site_that_is_still_off_is_named():
    model, x = make("conv")
    captured, _ = folded(model, make_scheme(), x)
    quants = [m for m in captured.modules() if isinstance(m, FakeQuant) and m.site == "2"]
    quants[0].phase = type(quants[0].phase).FLOAT
    with pytest.raises(ExportError, match=r"1 sites.*'2'"):
        convert(captured)


def _clips(converted: fx.GraphModule) -> list[nn.Module]:
    called = [converted.get_submodule(str(n.target)) for n in converted.graph.nodes
              if n.op == "call_module"]  # fmt: skip
    return [m for m in called if isinstance(m, nn.ReLU | nn.ReLU6)]


@pytest.mark.parametrize("limit", [3.0, 6.0, 20.0])
@pytest.mark.parametrize("activation", [{}, {"symmetric": False}, {"signed": True}], ids=str)
def test_relu6_becomes_the_bounds_of_the_codes(limit, activation):
    """The grid may end below or above 6; the codes must be those of an explicit ReLU6."""
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.Sequential(first, nn.ReLU6(), second)
    with torch.no_grad():
        for layer in (first, second):
            layer.weight.fill_(1.0)
            layer.bias.fill_(0.0)
    x = torch.linspace(-limit, limit, 256).view(-1, 1)
    captured, _ = folded(model, make_scheme(8, 8, activation=activation), x)
    codec = captured.get_submodule("activations.1")
    assert isinstance(codec, FakeQuant)
    codec.quantizer.set_range(torch.tensor(0.0), torch.tensor(limit))
    converted = convert(captured)
    assert not _clips(converted)
    probe = torch.linspace(-12, 12, 4001).view(-1, 1)
    with torch.no_grad():
        assert torch.equal(converted(probe), captured(probe))


def test_clips_with_other_readers_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.relu(self.a(x))
            return self.b(y) + torch.sin(y)

    x = torch.randn(8, 4)
    captured, _ = folded(Net(), make_scheme(), x)
    converted = convert(captured)
    # the quantize stands right behind the relu, so the relu has no other reader
    assert not _clips(converted)
    assert torch.equal(converted(x), captured(x))


def test_shared_scales_clip_only_where_a_relu_was():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.end, self.relu = nn.Linear(8, 4), nn.ReLU()

        def forward(self, x):
            return self.end(torch.cat([self.relu(self.a(x)), self.b(x)], 1))

    x = torch.randn(32, 4)
    captured, _ = folded(Net(), make_scheme(), x)
    converted = convert(captured)
    assert not _clips(converted)  # a codec of its own: the other branch has negative values
    assert torch.equal(converted(x), captured(x))


def test_dropout_and_training_heads_are_gone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aux, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            y = self.drop(self.a(x))
            return (self.b(y), self.aux(y)) if self.training else self.b(y)

    x = torch.randn(32, 4)
    captured, _ = folded(Net(), make_scheme(), x)
    converted = convert(captured)
    assert "aux" not in dict(converted.named_modules())
    assert torch.equal(converted.eval()(x), captured.eval()(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_converted_models_are_copied(clone):
    model, x = make("grouped")
    captured, _ = folded(warm_up(model, x), make_scheme(4, 4), x)
    converted = convert(captured)
    twin = clone(converted)
    assert torch.equal(twin(x), converted(x))
    assert {k: v.dtype for k, v in twin.state_dict().items()} == {
        k: v.dtype for k, v in converted.state_dict().items()
    }


def test_a_layer_called_twice_converts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x):
            return self.b(self.relu(self.a(self.relu(self.a(x)))))

    x = torch.randn(32, 4)
    _, _, converted = assert_converts_exactly(Net(), make_scheme(4, 8), x)
    layer = converted.get_submodule("a")
    assert isinstance(layer, IntegerLayer)
    assert layer.bias_codes is None  # its accumulators have two scales


def test_dead_channels_convert():
    model, x = make("conv")
    warm_up(model, x)
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[1].weight[3] = 0.0
        model[1].running_var[4] = 1e-12
        model[1].bias[3] = 5.0
        model[3].weight[:, 1] *= 1e-20
    captured, _ = folded(model, make_scheme(8, 8), x)
    converted = convert(captured)
    assert torch.equal(converted(x), captured(x))
    assert torch.isfinite(converted(x)).all()
    for module in converted.modules():
        if isinstance(module, IntegerLayer):
            assert module.bias_codes is not None
            assert module.bias_codes.abs().max() <= 2**30


class Moves(nn.Module):
    """Codes that are joined, split, padded and reordered on the way to their readers."""

    def __init__(self, padding=0.0):
        super().__init__()
        self.padding = padding
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 1) for n in (3, 4, 8))
        self.d, self.end = nn.Conv2d(2, 4, 3), nn.Linear(64, 5)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = torch.relu(self.c(torch.cat([x, torch.relu(self.b(x))], 1)))
        x = self.d(F.pad(x.chunk(2, 1)[1], (1, 1, 1, 1), value=self.padding))
        return self.end(F.max_pool2d(x, 2).transpose(1, 2).flatten(1))


def _moved(converted: fx.GraphModule) -> list[str]:
    """Return what stands between a quantize and its repetition."""
    modules, found = dict(converted.named_modules()), []
    for node in converted.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], ActivationCodec):
            name = op_name(node.args[0], modules)
            found += [name] if name in OPS and (OPS[name].passes or OPS[name].joins) else []
    return found


def test_a_quantize_stands_in_front_of_every_reader():
    x = torch.randn(16, 3, 8, 8)
    captured, _, converted = assert_converts_exactly(Moves(), make_scheme(4, 8), x)
    assert _moved(converted) == ["concat", "pad", "reshape"]
    assert torch.equal(IntegerRun(captured)(x), IntegerRun(converted)(x))


def test_no_quantize_where_padding_leaves_the_grid():
    x = torch.randn(16, 3, 8, 8)
    _, _, converted = assert_converts_exactly(Moves(-7.0), make_scheme(4, 8), x)
    assert _moved(converted) == ["concat", "reshape"]


class Alike(nn.Module):
    """What one layer makes is moved alike by two modules, and otherwise by a third."""

    def __init__(self):
        super().__init__()
        self.a, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.one, self.two, self.other = nn.Flatten(), nn.Flatten(), nn.Flatten(2)
        self.b, self.c, self.d = nn.Linear(144, 5), nn.Linear(144, 5), nn.Linear(36, 5)

    def forward(self, x):
        x = self.relu(self.a(x))
        return self.b(self.one(x)) + self.c(self.two(x)) + self.d(self.other(x)).sum(1)


def test_what_is_moved_alike_is_quantized_once():
    x = torch.randn(16, 3, 8, 8)
    _, _, converted = assert_converts_exactly(Alike(), make_scheme(4, 8), x)
    assert _moved(converted) == ["reshape", "reshape"]

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qat.batch_norm import channel_gain, channel_shift
from qat.codecs import ActivationCodec
from qat.errors import ExportError
from qat.export.packed import first_packed_difference, load_packed, save_packed
from qat.export.packed_file import pack_bits, unpack_bits
from qat.functional.codes import dequantize_codes
from qat.graph.convert import convert
from qat.integer_layers import IntegerLayer
from qat.spec import Rule
from tests.graph.test_convert import FORMATS, make
from tests.helpers import folded, make_scheme, warm_up


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 17))
def test_every_code_comes_back(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.arange(low, low + 2**bits, dtype=torch.int32)
    for values in (codes, codes.flip(0), codes[:-1], codes[: len(codes) - 3], codes[:1]):
        packed = pack_bits(values, bits)
        assert packed.dtype == torch.uint8
        assert len(packed) == -(-len(values) * bits // 8)
        assert torch.equal(unpack_bits(packed, bits, (len(values),), signed=signed), values)


def test_layout_is_lowest_bits_first():
    assert pack_bits(torch.tensor([1, 2]), 4).tolist() == [0x21]
    assert pack_bits(torch.tensor([-1, 0, 1]), 2).tolist() == [0b010011]
    assert pack_bits(torch.tensor([5, 3]), 3).tolist() == [0b011101]
    assert pack_bits(torch.tensor([0x1234]), 16).tolist() == [0x34, 0x12]
    assert pack_bits(torch.tensor([0x123, 0x456]), 12).tolist() == [0x23, 0x61, 0x45]


def test_shapes_come_back():
    codes = torch.randint(-4, 4, (3, 5, 7), dtype=torch.int32)
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, (3, 5, 7), signed=True), codes)
    nothing = torch.zeros(0, 4, dtype=torch.int32)
    assert unpack_bits(pack_bits(nothing, 3), 3, (0, 4), signed=True).shape == (0, 4)


@pytest.mark.parametrize("weight", [*FORMATS.values(), {"bits": 4, "group_size": 2}], ids=str)
@pytest.mark.parametrize("net", ["conv", "transposed"])
def test_weights_come_back_bit_for_bit(net, weight, tmp_path):
    model, x = make(net)
    if net == "transposed" and "group_size" in weight:
        pytest.skip("groups run along the inputs, which a transposed convolution has on axis 0")
    captured, _ = folded(warm_up(model, x), make_scheme(weight=weight), x)
    converted = convert(captured)
    save_packed(converted, x, tmp_path / "m.safetensors", metadata={"name": "test", "seed": 1})
    tensors, header = load_packed(tmp_path / "m.safetensors")
    assert (header["name"], header["seed"]) == ("test", 1)
    layers = {n: m for n, m in converted.named_modules() if isinstance(m, IntegerLayer)}
    assert set(header["weights"]) == set(layers)
    codecs = {m.site: m for m in converted.modules() if isinstance(m, ActivationCodec)}
    assert set(header["activations"]) == set(codecs)
    for site, form in header["activations"].items():
        codec = codecs[site]
        assert form == {"bits": codec.spec.bits, "qmin": codec.qmin, "qmax": codec.qmax}
    for name, layer in layers.items():
        form = header["weights"][name]
        codes = tensors[f"{name}.weight"]
        assert codes.dtype == torch.int32
        assert form["bits"] == weight["bits"]
        low, high = (-(2 ** (form["bits"] - 1)), 2 ** (form["bits"] - 1) - 1)
        if form["signed"]:
            assert low <= codes.min() <= codes.max() <= high
        values = dequantize_codes(
            codes,
            tensors[f"{name}.weight_scale"],
            tensors[f"{name}.weight_zero_point"],
            form["axis"],
            form["block"],
        )
        assert torch.equal(values, layer.weight)
        if layer.bias_codes is not None:
            assert torch.equal(tensors[f"{name}.bias_codes"], layer.bias_codes)
        else:
            assert torch.equal(tensors[f"{name}.bias_float"], layer._buffers["bias_float"])  # pyright: ignore[reportArgumentType]
    for module in converted.modules():
        if isinstance(module, ActivationCodec):
            assert torch.equal(tensors[f"{module.site}.scale"], module.scale)
            assert tensors[f"{module.site}.zero_point"] == module.zero_point.int()


def test_what_stays_float_is_stored_too(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    x = torch.randn(16, 4)
    captured, _ = folded(warm_up(model, x), make_scheme(), x)
    save_packed(convert(captured), x, tmp_path / "m.safetensors", metadata={})
    tensors, _ = load_packed(tmp_path / "m.safetensors")
    assert torch.equal(tensors["0.gain"], channel_gain(model[0]))
    assert torch.equal(tensors["0.shift"], channel_shift(model[0]))


@pytest.mark.parametrize(
    ("grid", "shares"),
    [
        ({"quantizer": "dynamic", "signed": True}, "token"),
        ({"quantizer": "dynamic_tensor", "signed": False, "symmetric": False}, "tensor"),
    ],
    ids=["token", "tensor"],
)
def test_the_header_says_which_values_share_a_scale_that_they_bring(grid, shares, tmp_path):
    fields = {"bits": 8, "observer": "min_max", **grid}
    reads = {"floats": Rule("*", activation="float"), "reads": Rule("*", activation=fields)}
    x = torch.randn(16, 4)
    captured, _ = folded(nn.Sequential(nn.Linear(4, 3)), make_scheme(rules=reads), x)
    converted, path = convert(captured), tmp_path / "m.safetensors"
    save_packed(converted, x, path, metadata={})
    form = load_packed(path)[1]["activations"]["input.input"]
    assert form == {
        "bits": 8,
        "qmin": -128 if grid["signed"] else 0,
        "qmax": 127 if grid["signed"] else 255,
        "dynamic": shares,
    }


@pytest.mark.parametrize(
    ("weights", "activations"), [pytest.param(2, 2, marks=pytest.mark.slow), (4, 4)]
)
def test_narrow_weights_take_less_than_in_onnx(exported_resnet20, weights, activations, tmp_path):
    exported = exported_resnet20(weights, activations)
    path = tmp_path / "m.safetensors"
    save_packed(exported.model, exported.x, path, metadata={})
    tensors, header = load_packed(path)
    size = path.stat().st_size - len(json.dumps(header["graph"]))
    assert size < exported.path.stat().st_size * (weights / 8 + 0.1)
    packed = sum(t.numel() for n, t in tensors.items() if n.endswith(".weight"))
    assert path.stat().st_size > packed * weights / 8


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "foreign", "half foreign"])
def test_files_that_are_not_ours(damage, tmp_path):
    model, x = make("linear")
    captured, _ = folded(model, make_scheme(), x)
    path = tmp_path / "m.safetensors"
    save_packed(convert(captured), x, path, metadata={})
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "text":
        path.write_text("weights")
    else:
        header = None if damage == "foreign" else {"qat": json.dumps({"name": "x"})}
        save_file({"a": torch.zeros(2)}, path, metadata=header)
    with pytest.raises(ExportError, match=r"m\.safetensors"):
        load_packed(path)


def test_the_first_tensor_that_differs_is_named(tmp_path):
    model, x = make("conv")
    captured, _ = folded(warm_up(model, x), make_scheme(4, 8), x)
    converted, path = convert(captured), tmp_path / "m.safetensors"
    save_packed(converted, x, path, metadata={"name": "test"})
    assert first_packed_difference(converted, path) is None
    for change in ("weight_codes", "weight_scale", "bias_codes"):
        other = convert(captured)
        layer = other.get_submodule("3")
        getattr(layer, change).flatten()[0] += 16
        named = "3.weight" if change == "weight_codes" else f"3.{change}"
        assert first_packed_difference(other, path) == named
    codec = next(m for m in converted.modules() if isinstance(m, ActivationCodec))
    codec.qmax -= 1
    assert first_packed_difference(converted, path) == "activations"

"""A language model on its way from tokens to a file: int64 in, logits of every position out."""

import onnx
import pytest
import torch

from qat.codecs import DynamicCodec
from qat.export.agreement import compare_outputs
from qat.export.onnx import export_onnx
from qat.export.packed import load_packed, save_packed
from qat.export.runtime import OnnxModel
from qat.graph.convert import convert
from qat.integer_layers import IntegerLayer
from qat.layers import quantized_layers
from qat.models import build
from qat.reference.run import IntegerRun
from qat.spec import Rule
from qat.training.evaluate import first_output
from tests.helpers import folded, make_scheme

GROUPS = {"group_size": 8, "narrow": False}
FLOATS = Rule("*", activation="float")
DYNAMIC = {"bits": 8, "quantizer": "dynamic", "observer": "min_max"}
READS = Rule("@to:linear", activation=DYNAMIC)
SCHEMES = {
    "int4": make_scheme(4, weight=GROUPS, rules={"floats": FLOATS}),
    "8da4w": make_scheme(4, weight=GROUPS, rules={"floats": FLOATS, "reads": READS}),
    "w8a8": make_scheme(8, 8),
}
MORE = [("int4", False), ("8da4w", True), ("w8a8", False)]


def tokens(batch):
    return torch.randint(0, 256, (batch, 12), generator=torch.Generator().manual_seed(batch))


@pytest.fixture(
    params=[
        ("int4", True),
        ("8da4w", False),
        ("w8a8", True),
        *(pytest.param(m, marks=pytest.mark.slow) for m in MORE),
    ],
    ids=lambda m: f"{m[0]}-{'tied' if m[1] else 'loose'}",
)
def model(request):
    scheme, tied = request.param
    torch.manual_seed(0)
    float_model = build("gpt", 256, context=12, width=16, depth=1, heads=2, tied=tied)
    with torch.no_grad():
        for parameter in float_model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # margins between the predictions
    return folded(float_model, SCHEMES[scheme], tokens(32))


def test_tokens_come_in_as_integers_and_every_prediction_is_kept(model, tmp_path):
    captured, _ = model
    converted = convert(captured)
    export_onnx(converted, tokens(2)[:1], tmp_path / "m.onnx")
    x = tokens(5)  # another batch size than that of the example
    reference = IntegerRun(captured)(x)
    assert reference.shape == (5, 12, 256)
    torch.testing.assert_close(IntegerRun(converted)(x), reference, rtol=0, atol=0)
    rows = [first_output(y) for y in (reference, OnnxModel(tmp_path / "m.onnx")(x))]
    agreement, difference = compare_outputs(*rows)
    assert agreement == 1.0
    assert difference < 2.5  # in 1/255 of the range; a code that turned is one step
    (source,) = onnx.load(tmp_path / "m.onnx").graph.input
    kind = source.type.tensor_type
    assert kind.elem_type == onnx.TensorProto.INT64
    assert [d.dim_value or d.dim_param for d in kind.shape.dim] == ["batch", 12]


def test_biases_are_integers_where_a_fixed_grid_is_read(model):
    captured, plan = model
    layers = [m for m in convert(captured).modules() if isinstance(m, IntegerLayer)]
    biases = [m for m in layers if m.bias_codes is not None]
    assert bool(biases) == (plan.weights["head"].format.spec.group_size is None)


def test_a_dynamic_site_gives_its_layer_no_grid(model):
    captured, _ = model
    for _, layer in quantized_layers(captured):
        source = layer.links.input_quant
        if source is not None and source.quantizer.is_dynamic:
            assert layer._bias_scale() is None
            assert layer.integers().bias_scale is None


def test_packed_file_says_which_sites_are_dynamic(model, tmp_path):
    converted = convert(model[0])
    save_packed(converted, tokens(2), tmp_path / "m.safetensors", metadata={})
    stored, header = load_packed(tmp_path / "m.safetensors")
    sites = {m.site for m in converted.modules() if isinstance(m, DynamicCodec)}
    assert {s for s, form in header["activations"].items() if form.get("dynamic")} == sites
    assert not {f"{site}.scale" for site in sites} & stored.keys()

"""Models of several inputs and outputs, the whole way: one call, the same tree from every form."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qat.calls import Call
from qat.errors import ExportError, GraphError
from qat.export.agreement import compare_trees
from qat.export.file_call import FileCall
from qat.export.onnx import export_onnx
from qat.export.packed import first_packed_difference, save_packed
from qat.export.runtime import OnnxModel
from qat.export.sites import check_sites
from qat.export.verify import compare_sites
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.layers import fold
from qat.outputs import named_tensors
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from tests.helpers import calibrate, make_scheme

SAMPLES = 6
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64}
WORDS = {"vocab_size": 50, "max_position_embeddings": 16}


@dataclass
class Scores:
    """An output of a class of its own."""

    aux: torch.Tensor
    logits: torch.Tensor
    more: dict[str, Any]


class Recommender(nn.Module):
    """Ids in a dictionary, floats, a table without a batch, an optional mask, a constant."""

    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(30, 8), nn.Embedding(40, 8)
        self.mix, self.head = nn.Linear(21, 16), nn.Linear(16, 3)

    def forward(self, table, ids, floats, mask=None, *, scale=1.0, absent=None):
        x = torch.cat([self.user(ids["user"]), self.item(ids["item"]), floats @ table], 1)
        x = x if mask is None else x.masked_fill(mask, 0.0)
        hidden = torch.relu(self.mix(x)) * scale
        logits = self.head(hidden)
        return Scores(hidden.mean(1), logits, {"again": logits, "none": absent, "best": logits > 0})


def recommender():
    ids = {"user": torch.randint(0, 30, (SAMPLES,)), "item": torch.randint(0, 40, (SAMPLES,))}
    floats, mask = torch.randn(SAMPLES, 4), torch.rand(SAMPLES, 21) < 0.1
    return Recommender(), Call((torch.randn(4, 5), ids, floats), {"mask": mask, "scale": 2.0})


class Siamese(nn.Module):
    """Two images through one network; a tuple in a tuple."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(2 * 8 * 36, 2)

    def forward(self, left, right):
        a, b = self.tower(left), self.tower(right)
        return (a, b), self.head(torch.cat([a, b], 1))


def siamese():
    return Siamese(), Call((torch.randn(SAMPLES, 3, 8, 8), torch.randn(SAMPLES, 3, 8, 8)), {})


def words(length: int = 8) -> torch.Tensor:
    return torch.randint(1, 49, (SAMPLES, length))


def bert():
    labels: dict[str, Any] = {"num_labels": 4}
    config = transformers.BertConfig(**SMALL, **WORDS, **labels)
    mask = torch.ones(SAMPLES, 8, dtype=torch.long)
    mask[1::2, 5:] = 0
    model = transformers.BertForSequenceClassification(config)
    return model, Call((), {"input_ids": words(), "attention_mask": mask})


def clip():
    config = transformers.CLIPConfig(
        text_config={**SMALL, **WORDS, "bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 0},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    inputs = {"input_ids": words(), "pixel_values": torch.randn(SAMPLES, 3, 16, 16)}
    return transformers.CLIPModel(config), Call((), inputs)


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=50, **sizes, use_cache=False)
    model = transformers.T5ForConditionalGeneration(config)
    return model, Call((), {"input_ids": words(), "decoder_input_ids": words(5)})


def folded(make: Callable[[], tuple[nn.Module, Call]]) -> tuple[Any, Call, Any]:
    """Prepare, calibrate, take one step and fold; returns the model, a call and what it gave."""
    torch.manual_seed(0)
    model, call = make()
    captured, plan = prepare(model.eval(), make_scheme(), call)
    assert (captured.leaves, captured.follows_batch, plan.float_share) == ([], True, 0)
    calibrate(captured, call)
    found = named_tensors(call.on(captured.train())).values()
    torch.stack([x.square().mean() for x in found if x.requires_grad]).sum().backward()
    torch.optim.SGD(captured.parameters(), 1e-3).step()
    fold(captured.eval())
    return captured, call, call.on(model)


def assert_equal(ours: Any, theirs: Any) -> None:
    a, b = named_tensors(ours), named_tensors(theirs)
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_whole_way(make: Callable[[], tuple[nn.Module, Call]], folder: Any) -> tuple[Any, ...]:
    captured, call, original = folded(make)
    model, reference = convert(captured), call.on(IntegerRun(captured))
    assert type(reference) is type(original)
    assert_equal(reference, call.on(IntegerRun(model)))
    one = captured.signature.take(call, 1)
    path, packed = folder / "model.onnx", folder / "model.safetensors"
    sites = export_onnx(model, one, path)
    assert sites == check_sites(path, model)
    differing = compare_sites(partial(IntegerRun, model), path, sites, call)
    assert [site for site in differing if site.share > 0] == []
    save_packed(model, one, packed, metadata={})
    assert first_packed_difference(model, packed) is None
    assert_equal(reference, call.on(PackedModel(packed)))
    for batch in (call, one):
        expected, file = batch.on(IntegerRun(model)), OnnxModel(path)
        for kind in (file, ChipRun(model)) if len(named_tensors(expected)) > 1 else ():
            for output in compare_trees("", expected, batch.on(kind)):
                assert (output.agreement, round(output.largest)) == (1.0, 0)
    return model, call, path, packed


@pytest.mark.slow
@pytest.mark.parametrize("make", [bert, clip, t5, siamese])
def test_every_form_returns_the_same_tree(make, tmp_path):
    assert_whole_way(make, tmp_path)


def test_files_are_called_and_return_like_the_model(tmp_path):
    _, call, path, packed = assert_whole_way(recommender, tmp_path)
    file, other = OnnxModel(path), PackedModel(packed)
    names = [x.name for x in file.session.get_inputs()]
    assert names == ["table", "ids.user", "ids.item", "floats", "mask"]
    assert [x.shape[0] for x in file.session.get_inputs()] == [4, *["batch"] * 4]
    assert [*file.run(call)] == ["aux", "logits", "more.again", "more.best"]
    assert file.metadata == {}
    table, ids, floats = call.args
    for form in (file, other):
        result = form(table, ids, floats, call.kwargs["mask"], scale=2.0, absent=None)
        assert list(result) == ["aux", "logits", "more"]
        assert list(result["more"]) == ["again", "none", "best"]
        assert result["more"]["none"] is None
        by_name = {"table": table, "ids": ids, "floats": floats, **call.kwargs}
        assert_equal(result, form(**by_name))
        assert_equal(result, form(by_name))  # a batch, as calibration takes it
        with pytest.raises(GraphError, match=r"expected a call like the captured one.*scale=2.0"):
            form(table, ids, floats, call.kwargs["mask"], scale=3.0)
        with pytest.raises(GraphError, match="expected a call like the captured one"):
            form(table, ids, floats, scale=2.0)
        with pytest.raises(ExportError, match="inputs of shape"):
            form(table, ids, floats[:, :3], call.kwargs["mask"], scale=2.0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x, self.layer(x), x.shape[0]


def test_a_number_that_depends_on_the_batch_is_refused_by_name(tmp_path):
    captured, call, _ = folded(lambda: (Counting(), Call((torch.randn(SAMPLES, 4),), {})))
    assert call.on(IntegerRun(captured))[2] == SAMPLES
    with pytest.raises(ExportError, match=r"^expected tensors and constants.*'output\.2'.*leave"):
        export_onnx(convert(captured), call, tmp_path / "model.onnx")


def test_a_file_of_another_program_takes_tensors_in_a_row():
    call, (a, b) = FileCall(["a", "b"], ["x", "y"], {}), torch.randn(2, 3)
    assert call.feeds(Call((a, b), {})).keys() == call.feeds(Call((a,), {"b": b})).keys()
    assert call.build([a, b]) == {"x": a, "y": b}
    for wrong in (Call((a,), {}), Call((a, b, a), {}), Call((a, b), {"c": a})):
        with pytest.raises(ExportError, match="expected the inputs a, b"):
            call.feeds(wrong)

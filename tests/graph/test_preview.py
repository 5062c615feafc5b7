import pytest
import torch
from torch import nn

from qat.errors import GraphError, SpecError
from qat.graph.lint import lint
from qat.graph.preview import differences, preview, rows, totals
from qat.graph.table import diff_table, preview_table
from qat.graph.targets import TARGETS
from qat.spec import Rule, Scheme
from tests.helpers import make_scheme


def net():
    result = nn.Sequential()
    layers = {"a": nn.Conv2d(3, 4, 3, padding=1), "relu": nn.ReLU(), "b": nn.Conv2d(4, 6, 3)}
    for name, module in {**layers, "silu": nn.SiLU(), "c": nn.Conv2d(6, 2, 1)}.items():
        result.add_module(name, module)
    return result


def preview_of(**rules):
    return preview(net(), make_scheme(rules=rules), torch.randn(2, 3, 8, 8))


def test_a_row_for_every_site_and_layers_behind_what_they_read():
    plan = preview_of().plan
    found = [(row.kind[0], row.site, row.weight, row.activation) for row in rows(plan)]
    narrow = "i8 channel narrow"
    assert found == [
        ("a", "input.input", "-", "i8"),
        ("w", "a", narrow, "i8"),
        ("a", "relu", "-", "u8"),
        ("w", "b", narrow, "u8"),
        ("a", "silu", "-", "i8"),
        ("w", "c", narrow, "i8"),
    ]
    assert sum(row.share for row in rows(plan)) == pytest.approx(1)


def test_a_layer_that_reads_float_is_last_and_not_counted_as_quantized():
    plan = preview_of(relu=Rule("relu", None, "float")).plan
    assert [(row.site, row.activation) for row in rows(plan)][-1] == ("b", "float")
    shares = totals(plan)
    assert shares.share_in_weights == 1
    assert shares.share_in_both == pytest.approx(1 - plan.weights["b"].macs / plan.macs)


def test_totals_are_sums():
    plan = preview_of(b=Rule("b", {"bits": 4})).plan
    found = totals(plan)
    count = 4 * 27 + 6 * 36 + 2 * 6
    assert found.weight_float_bytes == 4 * count
    assert found.weight_bytes == 4 * 27 + 6 * 36 // 2 + 2 * 6 + 4 * (4 + 6 + 2)
    assert found.activation_float_bytes == 4 * found.activation_bytes
    assert (found.macs, found.opset) == (plan.macs, 13)


def test_rules_that_match_nothing_are_collected_and_change_nothing():
    wrong = {"one": Rule("nosuch", {"bits": 2}), "two": Rule("@matmul", None, {"bits": 2})}
    found = preview_of(**wrong)
    assert found.plan == preview_of().plan
    assert ["'one'" in text or "'two'" in text for text in found.unmatched] == [True, True]
    with pytest.raises(SpecError, match="at least one rule"):
        preview(net(), Scheme("x", {"one": Rule("nosuch", {})}), torch.randn(2, 3, 8, 8))


def test_other_mistakes_are_still_raised():
    model = net()
    layer = model.get_submodule("b")
    weight = layer._parameters.pop("weight")
    layer.__dict__["weight"] = weight  # nobody can train it
    with pytest.raises(GraphError, match="own its weight"):
        preview(model, make_scheme(), torch.randn(2, 3, 8, 8))


def test_differences_name_what_differs_and_what_is_float_in_one_of_them():
    first = preview_of().plan
    rules = {
        "b": Rule("b", {"bits": 4}),
        "c": Rule("c", "float"),
        "relu": Rule("relu", None, {"observer": "mse"}),
    }
    second = preview_of(**rules).plan
    pairs = differences(first, second)
    found = {a.site: (a.format, b and b.format) for a, b in pairs if a is not None}
    assert len(found) == len(pairs)
    narrow = "i8 channel narrow, uniform/min_max"
    assert found == {
        "b": (narrow, "i4 channel narrow, uniform/min_max"),
        "c": (narrow, None),
        "relu": ("u8, uniform/min_max", "u8, uniform/mse"),
    }
    assert differences(first, first) == []
    text = diff_table(first, second, ("one", "two"))
    assert "3 sites differ" in text
    assert "no site differs" in diff_table(first, first, ("one", "two"))


def test_the_table_shows_everything():
    found = preview_of(typo=Rule("bb", {"bits": 4}))
    text = preview_table(found, lint(found.plan, TARGETS["tensorrt"]), "tensorrt")
    for row in rows(found.plan):
        assert row.site in text
        assert f"{row.size_bytes:,}" in text
    assert "no integer form for this operation" in text
    assert "rules that match nothing:\n  expected rule 'typo'" in text
    assert "target tensorrt:\n  error: 'relu': unsigned codes" in text
    assert "no finding" in preview_table(found, [], "generic")

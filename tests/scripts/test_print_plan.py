import json

import pytest

from qat.models import build

NET = ("model=resnet20", "data=digits")
BODY = [f"layer{i}.{j}.conv{k}" for i in (1, 2, 3) for j in range(3) for k in (1, 2)]


def lines_with(text, site):
    return [line for line in text.splitlines() if f" {site} " in line]


def test_table_of_a_model(call, tmp_path):
    target = tmp_path / "plan.json"
    status, out, error = call("print_plan", *NET, "scheme=w8a8", "--json", target)
    assert (status, error) == (0, "")
    for layer in ("conv1", *BODY, "linear"):
        assert "i8 channel narrow" in lines_with(out, layer)[0]
    assert "no finding" in out
    values = json.loads(target.read_text())
    assert values["target"] == "onnxruntime_cpu"
    count = sum(p.numel() for n, p in build("resnet20", 10).named_parameters() if p.ndim > 1)
    assert values["totals"]["weight_float_bytes"] == 4 * count
    assert len([row for row in values["sites"] if row["kind"] == "weight"]) == 20


def test_diff_shows_exactly_the_layers_that_differ(call, tmp_path):
    target = tmp_path / "diff.json"
    given = [*NET, "scheme=w8a8", "--json", target, "--diff"]
    status, out, _ = call("print_plan", *given, "w4a8")
    assert status == 0
    shown = [line.split()[1] for line in out.splitlines() if " weight " in line]
    assert shown == BODY
    assert "activation " not in out
    assert "18 sites differ" in out
    sizes = [
        json.loads(target.read_text())[k]["totals"]["weight_bytes"] for k in ("first", "second")
    ]
    assert all(f"{size:,}" in out for size in sizes)
    assert sizes[0] > 1.9 * sizes[1]
    status, out, _ = call("print_plan", *given, "scheme.rules.ends=null")
    assert status == 0
    assert "no site differs" in out


def test_random_input_needs_no_data(call, tmp_path, monkeypatch):
    """The data of this recipe have no folder here, its model no weights."""
    monkeypatch.chdir(tmp_path)
    given = ["recipe=imagenet_resnet18_w4a8", "--input", "3,32,32", "--classes", "7"]
    status, out, error = call("print_plan", *given)
    assert (status, error) == (0, "")
    assert "7x512" in lines_with(out, "fc")[0]
    assert list(tmp_path.iterdir()) == []


def test_tokens_come_from_the_data(call):
    status, out, _ = call("print_plan", "recipe=gpt_w4", "model.depth=1")
    assert status == 0
    assert "i4 group32" in out


def test_what_is_missing_is_named(refuse, call):
    assert "value for data.root" in refuse("print_plan", "recipe=imagenet_resnet18_w4a8")
    assert "did you mean tensorrt" in refuse("print_plan", *NET, "target=tensort")
    assert "did you mean" in refuse("print_plan", *NET, "scheme=w8a9")


def test_rules_that_match_nothing_are_listed(call):
    rule = "+scheme.rules.mine={match: layr1.0.conv1, weight: {bits: 4}}"
    status, out, error = call("print_plan", *NET, rule)
    assert status == 1
    assert "rules that match nothing:\n  expected rule 'mine'" in out
    assert "layer1.0.conv1" in out.partition("rules that match nothing")[2]
    assert "total" in out
    assert error.startswith("qat: expected rule 'mine'")


def test_an_impossible_target_is_shown_and_fails(call):
    given = [*NET, "scheme=w8a8", "target=tensorrt"]
    status, out, error = call("print_plan", *given)
    assert status == 1
    assert "target tensorrt:\n  error: 20 sites, first 'relu'" in out
    assert error.startswith("qat: expected a plan that can run with target=tensorrt, got")


@pytest.mark.parametrize("given", [["--classes", "3"], ["--input", "3,x"], ["--input", "0"]])
def test_wrong_options(given, call):
    status, _, error = call("print_plan", *given)
    assert status == 2
    assert "usage:" in error

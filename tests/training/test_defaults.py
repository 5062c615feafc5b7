"""A callback that is made by hand does what the same one of a config does."""

import inspect

import pytest

from qat.compose import compose_plain
from qat.training import callbacks


def numbers(node):
    """Return the numbers that a config gives one of our callbacks, and those of its class."""
    kind = getattr(callbacks, node["_target_"].rpartition(".")[2], object)  # of others: nothing
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(kind).parameters.items()
        if isinstance(parameter.default, bool | int | float) and key in node and key != "seed"
    }
    return {key: node[key] for key in defaults}, defaults


@pytest.mark.parametrize(
    "words",
    [
        ["oscillations=freeze", "distillation=logits"],
        ["oscillations=dampen", "callbacks=early_stopping"],
    ],
    ids=str,
)
def test_numbers_that_configs_and_classes_both_name_are_the_same(words):
    nodes = {name: node for name, node in compose_plain(words)["callbacks"].items() if node}
    del nodes["best"]  # its numbers are Lightning's
    found = {name: numbers(node) for name, node in nodes.items()}
    assert {"calibrate", "probe_rate", "oscillations"} <= {
        n for n, pair in found.items() if pair[0]
    }
    for name, (given, defaults) in found.items():
        assert given == defaults, name

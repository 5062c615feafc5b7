"""Thousands of forged and damaged model files; ``pytest -s -m slow`` prints what is refused how."""

import sys

import pytest

from tests.export.test_hostile_files import exported, run_damaged, run_onnx, run_packed

pytestmark = pytest.mark.slow
COUNT = 1000
__all__ = ["exported"]  # the fixture


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("run", [run_packed, run_onnx], ids=["packed", "onnx"])
def test_forged_files(exported, tmp_path, run, seed):
    found = run(exported, tmp_path, COUNT, seed)
    assert sum(found.values()) == COUNT
    lines = [f"{number:5} {reason}" for reason, number in found.most_common()]
    sys.stdout.write("\n".join([f"{run.__name__}, seed {seed}", *lines, ""]))


@pytest.mark.parametrize("seed", range(1, 4))
def test_damaged_files(exported, tmp_path, seed):
    run_damaged(exported, tmp_path, COUNT, seed)

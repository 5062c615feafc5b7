"""Runs that end without files, because nothing integer could hold their codes."""

import json
from importlib import import_module

import pytest

from qat.compose import compose
from qat.errors import GraphError
from qat.run import run
from tests.runs import ROOT
from tests.test_recipes import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers
FLOATS = ["quantizer=fp8", "observer=min_max", "scheme.rules.ends=null"]
SMALL_FLOATS = [*TINY, *FLOATS, "schedule.float_epochs=1", "logger=none"]


def test_a_study_ends_with_accuracies_and_says_so(tmp_path, monkeypatch):
    report = run(compose([*SMALL_FLOATS, "target=simulation"], tmp_path))
    assert report is not None
    assert report.is_study
    assert {"float", "post_training", "fake_quant"} == report.accuracy.keys()
    assert min(report.accuracy.values()) > 60
    assert not [*tmp_path.glob("model.*")]
    assert json.loads((tmp_path / "report.json").read_text())["passed"] is None
    assert "nothing was exported" in (tmp_path / "report.md").read_text().splitlines()[0]
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = import_module("table")
    line = script.table(script.read_runs([tmp_path], lambda found: found)).splitlines()[-1]
    assert line.startswith("| tabular_w8a8 | 1 + 1 | 0 | ")
    assert f"| {report.accuracy['fake_quant']:.2f} | - | - |" in line


def test_a_target_with_files_refuses_it_before_training(tmp_path):
    with pytest.raises(GraphError, match=r"quantizer fp8 has no integer form.*target=simulation"):
        run(compose(SMALL_FLOATS, tmp_path))

"""Hundreds of damaged, hostile and odd data sets through set-up and their first batches."""

from pathlib import Path

import pytest
import torch

from qat.assemble import make
from qat.memory import available
from tests.campaigns.data_sets import EITHER, sets
from tests.campaigns.trial import Outcome, attempt, summary

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of making the files


def test_no_data_set_breaks_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes: dict[str, Outcome] = {}
    before = available()
    for number, (name, (end, write)) in enumerate(sets().items()):
        (folder := tmp_path / str(number)).mkdir()
        node = write(folder)
        outcome = attempt(lambda node=node: read(node))
        if outcome.end != "broken" and end not in (EITHER, outcome.end):
            outcome = Outcome("broken", f"should be {end}, was {outcome.end} {outcome.message}")
        outcomes[name] = outcome
        assert not Path("code-was-run").exists(), name
    print(summary(outcomes))  # noqa: T201 (the figures of the campaign)
    assert len(outcomes) >= 150
    assert {n: o.message for n, o in outcomes.items() if o.end == "broken"} == {}
    assert before - available() < 2e9


def read(node):
    """Set a data set up as a run does, and look at its first batches."""
    data = make(node, seed=0)
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    batches = [(x, None) for x in data.calibration_batches(1)]
    for x, y in [*batches, *(next(iter(loader)) for loader in loaders)]:
        assert x.shape[1:] == data.input_shape
        assert len(x) > 0
        assert torch.isfinite(x.float()).all()
        assert y is None or (int(y.min()) >= 0 and int(y.max()) < data.num_classes)

"""Hundreds of damaged, hostile and foreign start weights through the set-up of a run."""

from pathlib import Path

import pytest
import torch

from qat.assemble import set_up
from qat.compose import compose_plain
from qat.memory import available
from tests.campaigns.start_weights import EITHER, files
from tests.campaigns.trial import Outcome, attempt, summary

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of making the files


def test_no_file_of_start_weights_breaks_a_run(tmp_path, monkeypatch):
    config = compose_plain(["recipe=resnet_w4a8", "trainer.accelerator=cpu"])
    monkeypatch.chdir(tmp_path)
    outcomes: dict[str, Outcome] = {}
    before = available()
    for number, (name, (end, make)) in enumerate(files().items()):
        (folder := tmp_path / str(number)).mkdir()
        path = make(folder)
        outcome = attempt(lambda path=path: trained_from(config, path))
        if outcome.end != "broken" and end not in (EITHER, outcome.end):
            outcome = Outcome("broken", f"should be {end}, was {outcome.end} {outcome.message}")
        outcomes[name] = outcome
        assert not Path("code-was-run").exists(), name
    print(summary(outcomes))  # noqa: T201 (the figures of the campaign)
    assert len(outcomes) >= 150
    assert {n: o.message for n, o in outcomes.items() if o.end == "broken"} == {}
    assert before - available() < 2e9


def trained_from(config, path):
    """Set a run up and look at what its model starts from."""
    model = set_up({**config, "ckpt": str(path)}).captured
    for name, value in model.state_dict().items():
        if name.startswith(("conv1", "layer", "bn1", "linear")) and not name.endswith("scale"):
            assert torch.isfinite(value).all() or "quant" in name, name

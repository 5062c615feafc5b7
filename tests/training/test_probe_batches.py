"""What a probe reads of the data, and what it says."""

from types import SimpleNamespace
from typing import Any

import pytest

from qat.training.callbacks import ProbeRate, probe
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from tests.training.small import Data, make_task


def task_of(schedule: Schedule) -> Any:
    task = make_task(4, schedule)
    task.total_steps, task.rates = 40, Rates(0.05, "up to 0.5")
    return task


TRAINER: Any = SimpleNamespace(
    datamodule=Data(),
    gradient_clip_val=None,
    global_step=0,
    is_global_zero=True,
    strategy=SimpleNamespace(broadcast=lambda values: values),
)


@pytest.mark.parametrize("most", [8, 4])
def test_judges_are_other_samples_and_large_ones_come_in_smaller_batches(most, monkeypatch):
    monkeypatch.setattr(probe, "LEAST_SAMPLES", 2)
    monkeypatch.setattr(probe, "MOST_BYTES", 8 * most * 4 * 5 * 5 * 4)  # of 8 batches
    seen, judges = ProbeRate(6, 2)._batches(TRAINER, task_of(Schedule(0, 5)))
    assert [len(y) for _, y in seen + judges] == [most] * 8
    assert (len(seen), len(judges)) == (6, 2)
    samples = [tuple(x.flatten().tolist()) for batch, _ in seen + judges for x in batch]
    assert len({*samples}) == len(samples)


@pytest.mark.parametrize(("losses", "warned"), [(2.0, True), (1.0, True), (0.5, False)])
def test_a_probe_that_finds_nothing_warns(losses, warned, monkeypatch, caplog):
    small = SimpleNamespace(untrained=lambda: 1.0, loss_of=lambda rate: losses)
    monkeypatch.setattr(probe, "Miniature", lambda *args, **more: small)
    task, rates = task_of(Schedule(0, 5)), []
    monkeypatch.setattr(task, "use_rate", rates.append)
    with caplog.at_level("INFO", "qat"):
        ProbeRate(6, 2).on_train_batch_start(TRAINER, task, None, 0)
    assert len(rates) == 1
    assert any("no rate that was tried gains" in line for line in caplog.messages) is warned
    assert any(line.startswith(f"training at {rates[0]:g}") for line in caplog.messages)

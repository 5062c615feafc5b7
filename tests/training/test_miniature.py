"""The quantized part in miniature passes the milestones of the run, in its order."""

from qat.fake_quant import activation_quants, weight_quants
from qat.training.callbacks import miniature
from qat.training.callbacks.calibrate import observe
from qat.training.callbacks.miniature import Miniature
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from tests.training.small import Data, make_task


def test_what_does_not_quantize_yet_is_observed_once_at_its_moment(monkeypatch):
    task, seen = make_task(4, Schedule(0, 5, activations=0.25)), []
    task.total_steps, task.rates = 40, Rates(0.05, 0.05)

    def note(model, quants, batches):
        active = any(quant.active for quant in weight_quants(model))
        seen.append((active, {quant.site for quant in quants}))
        observe(model, quants, batches)

    monkeypatch.setattr(miniature, "observe", note)
    batches = Data().labelled_batches(8)
    Miniature(task, batches[:6], batches[6:], None).loss_of(0.01)
    kinds = (weight_quants(task.model), activation_quants(task.model))
    weights, activations = ({quant.site for quant in quants} for quants in kinds)
    assert seen == [(False, weights), (True, activations)]
    assert not any(quant.active for quants in kinds for quant in quants)  # of the run itself


def test_a_rate_that_diverges_costs_no_more_steps(monkeypatch):
    task, batches = make_task(4, Schedule(0, 5)), Data().labelled_batches(8)
    task.total_steps, task.rates = 40, Rates(0.05, 0.05)
    small, losses = Miniature(task, batches[:6], batches[6:], None), iter([1.0, 3.9, 4.1])
    monkeypatch.setattr(small, "_step", lambda *args: next(losses))  # a fourth would be an error
    assert small.loss_of(0.01) == float("inf")

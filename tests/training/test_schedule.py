import math

import pytest

from qat.errors import ConfigError
from qat.training.schedule import ORDER, Schedule


def test_fractions_count_from_the_start_of_the_quantized_part():
    schedule = Schedule(float_epochs=3, epochs=7, calibrate=0.0, freeze_observers=0.5,
                        freeze_batch_norm=0.75, fold=1.0)  # fmt: skip
    assert schedule.start(1000) == 300
    steps = {name: schedule.step(name, 1000) for name in ORDER}
    assert steps == {
        "calibrate": 300,
        "activations": 300,
        "freeze_observers": 650,
        "freeze_batch_norm": 825,
        "fold": 1000,
    }


def test_integers_are_optimizer_steps():
    schedule = Schedule(float_epochs=1, epochs=1, calibrate=5, activations=20, freeze_observers=30,
                        freeze_batch_norm=40, fold=41)  # fmt: skip
    assert [schedule.step(n, 200) for n in ORDER] == [105, 120, 130, 140, 141]
    assert Schedule(fold=1, freeze_batch_norm=0.0, freeze_observers=0.0).step("fold", 100) == 1
    assert Schedule(fold=1.0).step("fold", 100) == 100


def test_without_float_epochs_everything_is_quantized():
    assert Schedule(float_epochs=0, epochs=9).start(12345) == 0


@pytest.mark.parametrize("epochs", [0, 1, 30])
def test_without_quantized_epochs_no_step_is_quantized(epochs):
    schedule, total = Schedule(float_epochs=epochs, epochs=0, activations=0.1), 9 * epochs
    assert {schedule.step(name, total) for name in ORDER} == {total}


def test_activations_come_with_the_weights_unless_said_otherwise():
    assert Schedule(calibrate=0.25).value("activations") == 0.25
    assert Schedule(calibrate=0.25, activations=0.4).value("activations") == 0.4
    assert Schedule(calibrate=0.25, activations=0.4).value("calibrate") == 0.25


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 12345])
def test_steps_are_in_order_for_every_length(total):
    schedule = Schedule(float_epochs=2, epochs=5, activations=0.1)
    steps = [schedule.step(n, total) for n in ORDER]
    assert steps == sorted(steps)
    assert 0 <= schedule.start(total) <= steps[0]
    assert steps[-1] <= total


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"float_epochs": -1}, "float_epochs"),
        ({"epochs": -1}, r"schedule\.epochs .*at least 0, got -1"),
        ({"epochs": 0.5}, r"schedule\.epochs .*whole number.* got 0\.5"),
        ({"epochs": True}, r"schedule\.epochs .*whole number.* got true"),
        ({"fold": math.nan}, r"schedule\.fold .* got nan"),
        ({"bits": {4: math.inf}}, r"schedule\.bits .* got \{4: inf\}"),
        ({"bits": {4: 0.0, 0: 0.1}}, r"schedule\.bits .* got \{4: 0\.0, 0: 0\.1\}"),
        ({"bits": {17: 0.0, 4: 0.1}}, r"schedule\.bits .* got \{17: 0\.0, 4: 0\.1\}"),
        ({"calibrate": -0.1}, r"schedule\.calibrate"),
        ({"fold": 1.5}, r"schedule\.fold"),
        ({"freeze_observers": -3}, r"schedule\.freeze_observers"),
        ({"calibrate": 0.6}, r"activations <= schedule\.freeze_observers.*0\.6 > 0\.5"),
        ({"fold": 0.5}, r"freeze_batch_norm <= schedule\.fold"),
        ({"freeze_observers": 0.7}, r"freeze_observers <= schedule\.freeze_batch_norm"),
        ({"calibrate": 0.3, "activations": 0.2}, r"calibrate <= schedule\.activations"),
        ({"freeze_batch_norm": 9, "fold": 8}, r"freeze_batch_norm <= schedule\.fold"),
    ],
)
def test_values_that_make_no_sense(values, match):
    with pytest.raises(ConfigError, match=match):
        Schedule(**values)


def test_bits_go_from_16_to_1():
    schedule = Schedule(bits={16: 0, 1: 0.5})
    assert [schedule.least_bits(step, 10) for step in (0, 4, 5)] == [16, 16, 1]


def test_a_milestone_behind_the_end_is_refused_once_the_length_is_known():
    schedule = Schedule(float_epochs=1, epochs=1, fold=51)
    Schedule(float_epochs=1, epochs=1, fold=50).check_length(100)
    Schedule(float_epochs=1, epochs=0, fold=51).check_length(
        100
    )  # all at the end of the float part
    with pytest.raises(ConfigError, match=r"schedule\.fold within the 50 .*steps.* got 51"):
        schedule.check_length(100)
    with pytest.raises(ConfigError, match=r"schedule\.bits\.4 within the 100 .*steps.* got 101"):
        Schedule(bits={8: 0, 4: 101}, freeze_observers=0.5).check_length(100)

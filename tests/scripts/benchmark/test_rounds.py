"""Statistics against numbers worked out by hand, and the order of the turns."""

import pytest


@pytest.fixture
def rounds(load_script):
    return load_script("benchmark/rounds")


def test_everyone_takes_one_turn_a_round_in_the_same_order(rounds):
    expected = [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")]
    assert list(rounds.turns("abc", 2)) == expected


def test_summary(rounds):
    found = rounds.summarise([[0.001, 0.003], [0.002, 0.002]], batch=4)
    assert found.calls == 4
    assert found.median_ms == pytest.approx(2.0)
    assert found.p99_ms == pytest.approx(2.97)  # 0.97 of the way from the third call to the fourth
    assert found.throughput == pytest.approx(4 * 4 / 0.008)


def test_rounds_of_different_length_count_call_by_call(rounds):
    found = rounds.summarise([[0.001], [0.003, 0.003, 0.003]], batch=1)
    assert found.median_ms == pytest.approx(3.0)
    assert rounds.medians([[1.0], [4.0, 2.0, 9.0]]) == [1.0, 4.0]


def test_ratio_is_taken_round_by_round(rounds):
    reference = [[2.0], [4.0, 4.0], [6.0], [8.0]]
    other = [[1.0], [1.0], [2.0], [7.0, 8.0, 9.0]]
    found = rounds.compare(reference, other)  # 2, 4, 3, 1
    assert (found.low, found.median, found.high) == (1.75, 2.5, 3.25)


def test_a_machine_that_slows_down_changes_no_ratio(rounds):
    slower = [1.0, 2.0, 5.0, 9.0]
    found = rounds.compare([[3 * s] for s in slower], [[s] for s in slower])
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)

import torch

from qat.functional.stochastic import round_stochastically


def test_goes_to_one_of_both_neighbours_with_the_right_chance():
    share = torch.linspace(0, 1, 9)[:-1]
    steps = (torch.tensor([[-2.0], [0.0], [5.0]]) + share).expand(20_000, 3, 8)
    rounded = round_stochastically(steps)
    assert ((rounded == steps.floor()) | (rounded == steps.floor() + 1)).all()
    up = (rounded - steps.floor()).mean(0)
    # Six standard deviations of a mean of 20000 coins.
    assert ((up - share).abs() <= 6 * (share * (1 - share) / 20_000).sqrt()).all()


def test_whole_numbers_stay_however_large():
    whole = torch.arange(-40_000, 40_000).float()
    for _ in range(5):
        assert torch.equal(round_stochastically(whole), whole)


def test_it_is_the_seed_that_decides():
    steps = torch.randn(1000)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(round_stochastically(steps))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])

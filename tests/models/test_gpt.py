import pytest
import torch
from torch.nn import functional as F

from qat.errors import ConfigError
from qat.models import build


def gpt(**kwargs):
    torch.manual_seed(0)
    return build("gpt", 256, **{"context": 12, "width": 16, "depth": 2, "heads": 4, **kwargs})


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))


def test_shape(tokens):
    assert gpt()(tokens).shape == (3, 12, 256)


def test_a_token_sees_nothing_behind_it(tokens):
    model, changed = gpt(), tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not (before[:, 7:] == after[:, 7:]).all(-1).any()


def test_order_matters(tokens):
    model = gpt()
    assert not torch.allclose(model(tokens)[:, -1], model(tokens.flip(1)).flip(1)[:, -1])
    same = model(torch.full((1, 12), 65))  # one token, twelve positions
    assert not torch.allclose(same[0, 0], same[0, 11])


def test_it_starts_by_guessing(tokens):
    loss = F.cross_entropy(gpt(width=64)(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.02)


def test_tied_head_is_the_embedding():
    loose, tied = gpt(), gpt(tied=True)
    assert tied.get_parameter("head.weight") is tied.get_parameter("token.weight")
    count = [sum(p.numel() for p in model.parameters()) for model in (loose, tied)]
    assert count[0] - count[1] == 256 * 16


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="heads=3 does not divide width=16"):
        gpt(heads=3)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"depth": 0}, r"model\.depth to be a whole number from 1 to 1000, got 0"),
        ({"depth": 10**20}, r"model\.depth .*got 1000"),
        ({"width": -1}, r"model\.width .*got -1"),
        ({"width": 0.5}, r"model\.width .*got 0\.5"),
        ({"heads": 3, "width": 8}, "heads=3 does not divide width=8"),
        ({"width": 2**16, "depth": 1000}, "weights of gpt to fit into .*: lower its sizes"),
    ],
)
def test_sizes_out_of_range(sizes, words):
    with pytest.raises(ConfigError, match=words):
        build("gpt", 8, **{"context": 4, **sizes})

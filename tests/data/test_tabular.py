import pytest

from qat.data import TabularData
from qat.errors import ConfigError


@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_model_learns_the_table(seed: int) -> None:
    from sklearn.linear_model import LogisticRegression

    data = TabularData(seed=seed, batch_size=10_000)
    (x, y), (x_test, y_test) = (
        next(iter(data.train_dataloader())),
        next(iter(data.test_dataloader())),
    )
    assert data.input_shape == (4,)
    assert (data.num_classes, len(x_test)) == (10, 2000)
    assert LogisticRegression(max_iter=300).fit(x.numpy(), y.numpy()).score(x_test, y_test) > 0.9


def test_table_too_small() -> None:
    with pytest.raises(ConfigError, match=r"data\.num_samples .* at least 10, got 9"):
        TabularData(num_samples=9)

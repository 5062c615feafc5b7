"""How initialisers are named, ordered and run at calibration."""

import pytest

from qat.assemble import make
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.initialise import AdaRound, BiasCorrection, Equalise, Initialiser, check_order


class Grids(Initialiser):
    reads_grids = True

    def __call__(self, model, batches, reference):
        return ""


def test_order():
    check_order({})
    check_order({"equalise": Equalise(), "grids": Grids()})
    with pytest.raises(ConfigError, match=r"expected equalise in front of grids .* swap them"):
        check_order({"grids": Grids(), "equalise": Equalise()})
    words = {"equalise": Equalise(), "adaround": AdaRound(), "bias_correction": BiasCorrection()}
    check_order(words)
    with pytest.raises(ConfigError, match=r"expected adaround in front of bias_correction"):
        check_order({k: words[k] for k in ("bias_correction", "adaround")})


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("none", []),
        ("equalise", [Equalise]),
        ("[equalise]", [Equalise]),
        ("[equalise,adaround,bias_correction]", [Equalise, AdaRound, BiasCorrection]),
    ],
)
def test_words(words, kinds):
    config = compose_plain([f"initialise={words}"])["callbacks"]["calibrate"]
    assert [type(i) for i in make(config).initialisers.values()] == kinds


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("equalize", "got 'equalize': did you mean equalise"),
        ("[equalise,xyz]", "got 'xyz': choose one of adaround, bias_correction, equalise, none"),
    ],
)
def test_wrong_words(words, match):
    with pytest.raises(ConfigError, match=match):
        compose_plain([f"initialise={words}"])


def test_wrong_values():
    overrides = ["initialise=equalise", "+initialise.equalise.nonsense=1"]
    with pytest.raises(ConfigError, match=r"No key initialise\.equalise\.nonsense"):
        compose_plain(overrides)

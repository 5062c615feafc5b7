"""Checkpoints of other tools' habits: the model under keys and prefixes, beside other tensors."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qat.errors import CheckpointError
from qat.models import load_checkpoint


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small(classes: int = 4, fill: float | None = None) -> nn.Module:
    """A model without names of its own, whose values are random or all the same."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes)
    )
    for value in model.state_dict().values() if fill is not None else ():
        value.fill_(fill)
    return model


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def outcome(content: Any, path: Path, **options: Any) -> dict[str, Tensor] | str:
    """What a model of 4 classes, filled with 7, holds after loading; or the error."""
    torch.save(content, path)
    model = small(fill=7)
    try:
        load_checkpoint(model, path, **options)
    except CheckpointError as error:
        assert equal(model.state_dict(), small(fill=7).state_dict())
        return str(error)
    return model.state_dict()


ONE, TWO = small(fill=1).state_dict(), small(fill=2).state_dict()
BIG = {f"text.{i}.weight": torch.ones(50, 50) for i in range(2)}
MOMENT = torch.optim.SGD(small().parameters(), 0.1, momentum=0.9).state_dict()
HABITS = {
    "deep chain": under("a.b.c.d.e.f.g.h.i.j.", ONE),
    "chain of keys": {"best": {"weights": [{"module": under("x.", ONE)}]}},
    "compiled inside": {k.replace("3.", "3._orig_mod.", 1): v for k, v in ONE.items()},
    "criterion": {"state_dict": {**under("model.", ONE), "criterion.weight": torch.ones(4)}},
    "criterion and model at the top": {**ONE, "loss_fn.weight": torch.ones(4)},
    "metrics": {"state_dict": {**ONE, "trainAcc.tp": torch.ones(4), "val_f1.confmat": BIG}},
    "counters of operations": {**ONE, "total_ops": torch.ones(1), "1.total_ops": torch.ones(1)},
    "other networks": {"state_dict": under("visual.", ONE), "text": BIG, "optimizer": MOMENT},
    "averages behind": {"model": ONE, "model_ema": under("module.", TWO)},
    "averages in front": {"ema": TWO, "state_dict_ema": TWO, "params": ONE},
    "averages at the top": {**ONE, **under("ema.", TWO), "n_averaged": torch.ones(1)},
    "averages alone": {"ema": {"module": ONE}},
    "larger teacher": {
        **under("student.", ONE),
        **under("teacher.", TWO),
        **under("teacher.", BIG),
    },
    "momentum": {
        **under("m.encoder_q.", ONE),
        **under("m.encoder_k.", TWO),
        "m.queue": ONE["0.bias"],
    },
    "known key before others": {"old": TWO, "net": ONE},
    "the same twice": {**under("a.", ONE), **under("b.", ONE)},
    "namespace": {"model": ONE, "args": argparse.Namespace(path=Path("x"), best=np.float64(3))},
    "half": {"model": {k: v.half() for k, v in ONE.items() if "num_batches" not in k}},
}
"""Files whose model is all ones, whatever stands beside it."""


@pytest.mark.parametrize("habit", HABITS)
def test_the_model_is_found_under_any_key_and_prefix_beside_anything_else(
    habit: str, tmp_path: Path
) -> None:
    state = outcome(HABITS[habit], tmp_path / "a b ü.pt")
    assert not isinstance(state, str), state
    assert all(bool((v == (7 if n == "1.num_batches_tracked" and habit == "half" else 1)).all())
               for n, v in state.items())  # fmt: skip
    assert state["0.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "key", "found"),
    [
        ({"model": ONE, "model_ema": under("module.", TWO)}, "model_ema", 2),
        ({"state_dict": {**under("student.", ONE), **under("teacher.", TWO)}}, "teacher", 2),
        ({"generator": ONE, "discriminator": TWO}, "discriminator", 2),
        ({"generator": ONE, "discriminator": TWO}, None, "choose one, such as ckpt_key=generator"),
        ({**under("a.", ONE), **under("b.", TWO)}, None, "fits under a, b, with other values"),
        ({**under("visual.", ONE), **BIG}, "visual", 1),
        ({**under("visual.", ONE), **BIG}, None, "9 fit under visual, .*add ckpt_key=visual"),
        ({"model": ONE}, "ema", "ckpt_key to be a key or prefix of .*'ema'; choose one of model"),
        (ONE, "ema", "the file has none, so leave it out"),
        ({**ONE, "4.weight": torch.ones(4, 4)}, None, "9 fit, and found 1 unexpected: 4.weight"),
        (under("m.", {**ONE, "3.n.weight": ONE["3.bias"]}), None, "under m, and found 1 unexp"),
        ({k: v for k, v in ONE.items() if k[0] == "3"}, None, "2 fit, and found 6 missing"),
        ({"state": under("other.", BIG)}, None, "0 fit under state.other.text, .*model.name"),
    ],
)  # fmt: skip
def test_several_models_need_a_key_and_parts_of_one_are_refused(
    content: Any, key: str | None, found: int | str, tmp_path: Path
) -> None:
    state = outcome(content, tmp_path / "model.pt", key=key)
    if isinstance(found, int):
        assert not isinstance(state, str), state
        assert all(bool((value == found).all()) for value in state.values())
    else:
        assert isinstance(state, str)
        assert re.search(found, state), state


WIDE = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Flatten(), nn.Linear(9, 4))
MORE = small(7, fill=1).state_dict()


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        (MORE, "the number of classes differs (7, not 4): ckpt_new_head=true"),
        ({"model": under("module.", MORE), "ema": small(7, 2).state_dict()}, "ckpt_new_head=true"),
        ({n: v for n, v in ONE.items() if n[0] != "3"}, "not in the file: ckpt_new_head=true"),
        ({**{n: v for n, v in ONE.items() if n[0] != "3"}, "3.0.weight": BIG["text.0.weight"]},
         "1 unexpected: 3.0.weight; the last layer is not in the file: ckpt_new_head=true"),
        (WIDE.state_dict(), None),
        ({n: MORE[n] for n in ("3.weight", "3.bias")}, None),
        ({k: v for k, v in ONE.items() if k[0] == "3"}, None),
        ({**MORE, "4.weight": torch.ones(4, 4)}, None),
    ],
)  # fmt: skip
def test_a_new_head_takes_the_rest_of_the_file_and_nothing_else(
    content: Any, refused: str | None, tmp_path: Path
) -> None:
    before = outcome(content, tmp_path / "model.pt")
    assert isinstance(before, str)
    after = outcome(content, tmp_path / "model.pt", new_head=True)
    if refused is None:
        assert "check model.name" in before == after
        return
    assert refused in before
    assert isinstance(after, dict), after
    assert all(bool((v == (7 if n[0] == "3" else 1)).all()) for n, v in after.items())


def test_what_a_model_does_not_save_or_ties_may_differ(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("positions", torch.arange(4), persistent=False)

    for name in ("embed.weight", "head.weight"):
        model = Tied()
        state = {f"model.{name}": torch.ones(5, 3), "model.positions": torch.arange(4)}
        torch.save(state, path := tmp_path / "model.pt")
        load_checkpoint(model, path)
        assert bool((model.embed.weight == 1).all())
        assert model.head.weight is model.embed.weight


def test_a_wrapped_model_takes_the_bare_one(tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"net": nn.ModuleDict({"body": small(fill=7)})})
    torch.save({"state_dict": under("m.", ONE)}, path := tmp_path / "model.pt")
    load_checkpoint(wrapped, path)
    assert all(bool((value == 1).all()) for value in wrapped.state_dict().values())

"""Every key of a config with every wrong value: refused by name, in one line, before any data.

What passes is listed here, each with its reason, so that a value ignored in silence cannot hide.
"""

import math
import re
from functools import reduce

import pytest

from qat.assemble import export_settings, make_schedule, make_scheme
from qat.compose import compose_plain
from qat.errors import QatError
from qat.folders import find_folder
from qat.settings.check import check
from qat.settings.names import flatten
from qat.trainer import make_trainer
from tests.test_settings import changed

WRONG = (math.nan, math.inf, "abc", -1, 0.5, 1e300, True, None, [], ["abc"], {"a": 1}, "", "a/b")
BASE = [
    "recipe=tabular_w8a8",
    "optimizer=sam",
    "distillation=logits",
    "oscillations=freeze",
    "initialise=adaround",
    "pruning=magnitude",
    "callbacks=early_stopping",
    "+callbacks.ema={_target_: qat.training.callbacks.EMA, decay: 0.9}",
]
COPIES = ("callbacks.distill", "callbacks.oscillations", "callbacks.calibrate.initialise")
"""What only refers to other keys."""
TEXTS = {"abc", "a/b"}
LEGITIMATE = {
    r"name": {"abc"},
    r"output_dir|scheme\.name|target": TEXTS,  # targets are looked up beside the table
    r"ckpt|ckpt_key|ckpt_path": {*TEXTS, None},  # files are looked for beside the table
    r"prediction": {*TEXTS, None, 0, 1},  # outputs are looked for in the model
    r"scheme\.rules\.\w+(\.(weight|activation))?": {None},
    r"scheme\.rules\.\w+\.match": TEXTS,  # what matches nothing is known when the model is
    r"scheme\.rules\.body\.weight\.(axis|group_size)": {None},
    r"schedule\.(activations|bits)": {0.5, None},
    r"schedule\.(calibrate|freeze_observers|freeze_batch_norm)": {0.5},
    r"pruning\.(ratio|start|end)": {0.5},
    r"pruning\.(layers|skip)": {*TEXTS, ""},
    r"distillation|oscillations|distillation\.(model|ckpt)": {None},
    r"distillation\.(weight|temperature)|oscillations\.(start|momentum)": {0.5, 1e300},
    r"initialise\.adaround\.(learning_rate|regularisation|warm_up)": {0.5, 1e300},
    r"optimizer\..*(rho|momentum|lr|scale_lr_ratio|weight_decay)": {0.5, 1e300},
    r"optimizer\.(rates\.(warmup|end_ratio)|label_smoothing)": {0.5},
    r"optimizer\.rates\.decay_by_bits": {None},
    r"callbacks\.\w+|logger\.\w+": {None},  # switched off
    r"export\.samples": {None},  # all
    r"callbacks\.ema\.decay|export\.threshold": {0.5},
    r"callbacks\.(last|best)\.(dirpath|filename)": {*TEXTS, None},
    r"callbacks\.\w+\.(monitor|logging_interval|every_n_train_steps|save_on\w+)": {None},
    r"trainer\.(max_epochs|log_every_n_steps|deterministic)": {None},
    r"trainer\.limit_(train|val)_batches": {0.5, None},
    r"trainer\.gradient_clip_val": {0.5, 1e300, None},
    r"logger\.\w+\.(save_dir|name|version)": {*TEXTS, "", None, -1},
    r"data\.(batch_size|val_fraction)": {-1, 0.5, 1e300},  # the data module's own ranges
}


def may_pass(key, value, before):
    """Whether a value is right after all; true is wherever there was a flag."""
    if value is True and isinstance(before, bool):
        return True
    if key == "imports" and value in ([], ["abc"]):  # modules are looked for beside the table
        return True
    if key == "trainer.deterministic" and value is True:
        return True
    if value is True and key.endswith((".signed", "save_on_train_epoch_end")):
        return True
    return any(
        re.fullmatch(pattern, key) and type(value) in (str, int, float, type(None)) and value in ok
        for pattern, ok in LEGITIMATE.items()
    )


def outcome(base, key, value):
    """Return the sentence that refuses a value, or ``None`` where it passes."""
    config = changed(base, key, value)
    if isinstance(config["callbacks"], dict):  # which refers to these groups
        config["callbacks"]["distill"] = config["distillation"]
        config["callbacks"]["oscillations"] = config["oscillations"]
        if isinstance(config["callbacks"].get("calibrate"), dict):
            config["callbacks"]["calibrate"]["initialise"] = config["initialise"]
    try:
        check(config)
        config["callbacks"] = {k: v for k, v in config["callbacks"].items() if v}
        make_trainer(config, make_schedule(config))
        make_scheme(config["scheme"])
        export_settings(config)
    except QatError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_key_with_every_wrong_value(tmp_path, record_property):
    base = compose_plain(BASE)
    keys = [key for key in flatten(base) if not key.startswith(COPIES)]
    refused, passed, unclear = [], [], []
    for key in keys:
        before = reduce(dict.__getitem__, key.split("."), base)
        for value in WRONG:
            sentence = outcome(base, key, value)
            if sentence is None:
                passed += [] if may_pass(key, value, before) else [(key, value)]
                continue
            refused.append(f"{key}={value!r}: {sentence}")
            if "\n" in sentence or key.rpartition(".")[2] not in sentence:
                unclear.append(refused[-1])
    record_property("refused", f"{len(refused)} of {len(keys) * len(WRONG)}")
    (tmp_path / "refused.txt").write_text("\n".join(refused), encoding="utf-8")
    assert passed == []
    assert unclear == []
    assert len(refused) > 300


GIVEN = {
    "model=custom": ["model._target_=torchvision.models.resnet18"],
    "model=timm": ["model.model_name=resnet10t"],
    "data=arrays": ["data.path=a.npz"],
    "data=folder": ["data.root=images"],
}
"""What some choices cannot do without."""
OPEN = r"model\.(?!name)\w+|callbacks\.\w+|logger\.\w+"
"""Where names are the user's own: arguments of any class, and entries that may be null."""
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in find_folder("conf").glob("*/*.yaml")
    if path.parent.name != "model" or path.stem in ("gpt", "linear", "custom", "timm")
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choice", CHOICES)
def test_every_misspelled_key_of_every_choice(choice):
    base = compose_plain(["recipe=tabular_w8a8", choice, *GIVEN.get(choice, [])])
    group, _, word = choice.partition("=")
    keys = [key for key in flatten(base) if key.startswith(f"{group}.")]
    is_open = group == "model" and word in ("custom", "timm")
    for key in keys:
        for wrong in (f"{key}s", key[:-1], f"{key.rpartition('.')[0]}.nonsense"):
            if wrong in keys or (re.fullmatch(OPEN, wrong) and (is_open or group != "model")):
                continue
            sentence = outcome(base, wrong, 1)
            assert sentence is not None, wrong
            assert wrong.rpartition(".")[2] in sentence

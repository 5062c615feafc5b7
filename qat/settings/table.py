"""The keys of a config and what each may be, as one table; ``check`` reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.strategies import StrategyRegistry

from qat.export.storage import Storage
from qat.extensions import MODULES
from qat.kinds import (
    FILE,
    FLAG,
    FOLDER_NAME,
    FRACTION,
    NULL,
    WORD,
    Kind,
    each,
    number,
    whole,
    words,
)
from qat.models.registry import OURS, names
from qat.observers import OBSERVERS
from qat.quantizers import QUANTIZERS
from qat.spec import FLOAT, FORMAT_KINDS
from qat.training.callbacks.prune import KINDS as PRUNING

LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class Group:
    """A mapping with these keys.

    Args:
        keys: Key to what it may be.
        others: What keys of the user's own may be; ``None`` if there are none.
        optional: Keys that may be missing.
        may_be: What it may be in place of a mapping.
        wanted: The words for the mapping in an error.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    others: Any = None
    optional: tuple[str, ...] = ()
    may_be: Kind | None = None
    wanted: str = "keys with values"


@dataclass(frozen=True)
class Built:
    """A mapping whose ``_target_`` is built from the other keys.

    Args:
        base: What it has to be an instance of.
        set_elsewhere: Its parameters that users cannot set, and the key that sets them.
        kinds: Narrower kinds than the annotations of its parameters.
        may_be_nothing: Whether it may be null or empty.
        is_base: Whether it has no ``_target_``, as it always is the base itself.
    """

    base: str
    set_elsewhere: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    may_be_nothing: bool = False
    is_base: bool = False


@dataclass(frozen=True)
class Named:
    """A word, or a mapping with ``name`` and the options of what it names.

    Args:
        classes: Word to class.
        set_elsewhere: Parameters of the classes that are no options.
    """

    classes: Mapping[str, Any]
    set_elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    """One of the words of a table, to which users may add.

    Args:
        classes: Word to class.
    """

    classes: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A mapping with the ``name`` of a model and its arguments, or one with ``_target_``.

    Args:
        built: What holds with ``_target_``.
        builders: Name to what builds it; others have arguments that are known only to them.
    """

    built: Built
    builders: Mapping[str, Any]


QUANTIZER = Named(QUANTIZERS, ("spec", "scale_shape", "has_batch"))
OBSERVER = Words(OBSERVERS)
PATCH = Group(
    {**FORMAT_KINDS, "quantizer": QUANTIZER, "observer": OBSERVER},
    optional=tuple(FORMAT_KINDS),
    may_be=words(FLOAT) | NULL,
    wanted="a format such as {bits: 4}",
)
RULE = Group(
    {"match": WORD, "weight": PATCH, "activation": PATCH, "optional": FLAG},
    optional=("match", "weight", "activation", "optional"),
    may_be=NULL,
    wanted="a rule such as {match: linear, weight: {bits: 4}}",
)
BATCHES = whole(1) | Kind("a fraction above 0.0", number(above=0, high=1).fits) | NULL
DEVICES = r"[1-9]\d*|\d+(,\d+)+,?|\d+,"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
STRATEGIES = words("auto", *StrategyRegistry.available_strategies())
TRAINER = {
    "accelerator": words("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators())),
    "devices": words("auto")
    | whole(1)
    | Kind("-1 for all", lambda v: v in (-1, "-1") and not isinstance(v, bool))
    | Kind("numbers such as '0,1'", lambda v: bool(re.fullmatch(DEVICES, str(v))))
    | each(whole(0), 1),
    "strategy": Kind(
        "auto, ddp or another strategy of Lightning", STRATEGIES.fits, STRATEGIES.words
    ),
    "precision": Kind(
        "32-true, bf16-mixed or 16-mixed",
        lambda v: v in (*PRECISIONS, 16, 32) and not isinstance(v, float),
        PRECISIONS,
    ),
    "max_epochs": whole(0) | NULL,
    "max_steps": whole(1) | Kind("-1 for no limit", lambda v: v == -1),
    "limit_train_batches": BATCHES,
    "limit_val_batches": Kind(
        f"{BATCHES.wanted}, as the quantized accuracy is measured there", BATCHES.fits
    ),
    "accumulate_grad_batches": whole(1),
    "gradient_clip_val": number(0) | NULL,
    "log_every_n_steps": whole(0) | NULL,
    "check_val_every_n_epoch": whole(1) | NULL,
    "num_nodes": whole(1),
    "val_check_interval": BATCHES,
    "fast_dev_run": Kind("false, as it keeps no checkpoint", lambda v: v is False),
}
MODEL = Kind("the name of a model", lambda v: isinstance(v, str) and v in names(), tuple(names()))
FIXED = ("use_distributed_sampler", "num_sanity_val_steps", "enable_model_summary")
RATES = {"params": "the model", "lr": "optimizer.rates.lr"}
RATES |= {"weight_decay": "optimizer.rates.weight_decay"}
CALLBACK = Built(
    "pytorch_lightning.Callback",
    kinds={
        "patience": whole(0),
        "min_delta": number(0),
        "dirpath": FILE | NULL,
        "filename": WORD | NULL,
        "save_top_k": whole(-1),
    },
    may_be_nothing=True,
)
ENDS = Group({"weight": QUANTIZER, "activation": QUANTIZER})
TABLE = Group(
    {
        "name": FOLDER_NAME,
        "seed": whole(0, LARGEST_SEED),
        "output_dir": FILE,
        "compile": words("off", "regional", "step"),
        "checkpointing": words("off", "auto")
        | Kind("a number of segments from 2 on", whole(2).fits),
        "channels_last": FLAG,
        "keep_memory": FLAG,
        "target": WORD,
        "prediction": WORD | whole(0) | NULL,
        "imports": MODULES,
        "ckpt": FILE | NULL,
        "ckpt_key": WORD | NULL,
        "ckpt_new_head": FLAG,
        "ckpt_path": FILE | NULL,
        "resume_changes": words("refuse", "allow"),
        "quantizer": Group({"weight": QUANTIZER, "activation": QUANTIZER, "ends": ENDS}),
        "observer": Group({"weight": OBSERVER, "activation": OBSERVER}),
        "scheme": Group(
            {
                "name": WORD,
                "batch_norm": words("late", "folded"),
                "functions": words("float", "table"),
                "rules": Group(others=RULE),
            },
            optional=("functions",),
        ),
        "schedule": Built("qat.training.schedule.Schedule"),
        "pruning": Built("qat.training.callbacks.Prune", kinds=PRUNING, is_base=True),
        "distillation": CALLBACK,
        "oscillations": CALLBACK,
        "initialise": Group(others=Built("qat.initialise.Initialiser", may_be_nothing=True)),
        "optimizer": Group(
            {
                "factory": Built("torch.optim.Optimizer", set_elsewhere=RATES),
                "rates": Built("qat.training.optim.Rates"),
                "label_smoothing": FRACTION,
            }
        ),
        "callbacks": Group(others=CALLBACK),
        "trainer": Built(
            "pytorch_lightning.Trainer",
            {"callbacks": "callbacks", "logger": "logger", **dict.fromkeys(FIXED, "qat")},
            TRAINER,
        ),
        "logger": Group(others=Built("pytorch_lightning.loggers.Logger", may_be_nothing=True)),
        "export": Group(
            {
                "storage": words(*get_args(Storage)),
                "threshold": FRACTION,
                "site_samples": whole(1),
                "samples": whole(1) | NULL,
                "trial": FLAG,
            },
            optional=("samples", "trial"),
        ),
        "data": Built("qat.data.DataModule", {"seed": "seed"}),
        "model": Model(Built("torch.nn.Module", {"num_classes": "data"}), OURS),
    }
)

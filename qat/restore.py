"""From a training checkpoint of ours back to its model: nothing is trained, no callback runs.

The config inside the checkpoint says how to build the model; the saved state brings the weights,
the scales and the phase of every fake-quant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.assemble import Config, Setup, set_up
from qat.errors import CalibrationError, CheckpointError, DataError, reason
from qat.export.outcome import Rate
from qat.fake_quant import Phase, fake_quants
from qat.graph.captured import Captured
from qat.layers import fold
from qat.models.pickles import read_pickle
from qat.stored_config import check_stored, import_stored, without_downloads
from qat.training.callbacks.anneal import anneal
from qat.training.callbacks.probe import choose
from qat.training.evaluate import Score
from qat.training.phases import is_quantized, phase_of

PREFIX = "model."  # the attribute of the LightningModule that holds the model
BUILT = ("data", "model", "schedule")
NEEDED = ("data", "model", "scheme", "schedule", "pruning", "trainer", "export", "seed", "name")


@dataclass(frozen=True)
class Checkpoint:
    """What a training checkpoint of ours holds.

    Attributes:
        path: The file.
        config: The config of its run.
        state: The model's tensors by name.
        callbacks: The saved state of every callback, by class name.
    """

    path: Path
    config: Config
    state: dict[str, Tensor]
    callbacks: Mapping[str, Any]

    @property
    def float_accuracy(self) -> float | None:
        """Percent that the float model reached on the test set, if it was measured."""
        found = self.callbacks.get("Calibrate", {}).get("baseline", [None])[0]
        return None if found is None else float(found)

    @property
    def scores(self) -> dict[str, Score]:
        """What the run measured before its quantized model was trained, by kind of model."""
        saved = self.callbacks.get("Calibrate", {}).get("scores", {})
        return {str(kind): Score(*map(float, values)) for kind, values in saved.items()}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each phase took, as far as the run had come."""
        saved = self.callbacks.get("Clock", {}).get("seconds", {})
        return {str(phase): float(value) for phase, value in saved.items()}

    @property
    def rate(self) -> Rate | None:
        """What the quantized model was trained with, if it was trained, and that is known."""
        saved = self.callbacks.get("ProbeRate", {})
        tried = {float(rate): float(loss) for rate, loss in saved.get("tried", {}).items()}
        given = self.config.get("optimizer", {}).get("rates", {}).get("qat_lr")
        if not self.config["schedule"].get("epochs"):
            return None
        if tried:
            untrained = float(saved["untrained"])
            return Rate(choose(tried, untrained), tried, untrained)
        return Rate(float(given)) if isinstance(given, int | float) else None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Read a training checkpoint of ours, or return ``None`` where a file is of another origin.

    Args:
        path: A file that ``torch.save`` wrote.

    Raises:
        CheckpointError: If the file is missing, corrupt, unsafe, or ours and damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint at '{path}', got no file: correct the path.")
    content = _plain(read_pickle(path))
    if not isinstance(content, dict):
        return None
    parameters = content.get("hyper_parameters")
    config = parameters.get("config") if isinstance(parameters, dict) else None
    if not isinstance(config, dict) or not set(NEEDED) <= config.keys():
        return None
    state, callbacks = content.get("state_dict"), content.get("callbacks", {})
    checkpoint = Checkpoint(path, config, _model_state(state, path), callbacks)
    _check_form(checkpoint)
    return checkpoint


def _model_state(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise _damaged(path, "state_dict", state)
    for key, value in state.items():
        if not isinstance(value, Tensor) or not _is_stored(value):
            raise _damaged(path, key, value)
        if bool(value.isnan().any()):
            raise _damaged(path, key, math.nan)
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def _plain(value: Any) -> Any:
    """Return containers as Python's own: a file can give others methods of its choice."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in dict.items(value)}
    if isinstance(value, list):
        return [_plain(part) for part in list.__iter__(value)]
    return value


def _is_stored(tensor: Tensor) -> bool:
    """Whether every value of a tensor has a place of its own: a view can claim any size."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_form(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose parts are not of the kinds that we write."""
    path, config = checkpoint.path, checkpoint.config
    for key in NEEDED:
        wanted = {"seed": int, "name": str}.get(key, dict)
        if not isinstance(config[key], wanted):
            raise _damaged(path, key, config[key])
    if not isinstance(checkpoint.callbacks, dict):
        raise _damaged(path, "callbacks", checkpoint.callbacks)
    for part in ("float_accuracy", "scores", "seconds", "rate"):
        try:
            getattr(checkpoint, part)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise _damaged(path, part, error) from error


def _damaged(path: Path, part: str, found: object) -> CheckpointError:
    kind = found if isinstance(found, float | torch.dtype) else type(found).__name__
    return CheckpointError(
        f"expected a training checkpoint of ours in '{path}', got {kind} for {part}: the file was "
        "changed or is damaged; use another."
    )


def restore(
    checkpoint: Checkpoint, changes: Config | None = None, allow: Sequence[str] = ()
) -> Setup:
    """Build the objects of a checkpoint's run, with the model as it was saved, in eval mode.

    Args:
        checkpoint: What ``read_checkpoint`` returned.
        changes: Entries of the config to replace, such as ``data``; they are trusted.
        allow: What the config may build beside what our own configs name.

    Raises:
        DataError: If the data have another number of classes than the checkpoint.
        ConfigError: If the config would build what nobody named.
        CheckpointError: If the config builds another model than the one that was saved.
    """
    built = [section for section in BUILT if section not in (changes or {})]
    check_stored(checkpoint.config, built, checkpoint.path, allow)
    import_stored(checkpoint.config, checkpoint.path, allow)
    config = {**checkpoint.config, **(changes or {}), "ckpt": None}
    config["trainer"] = {**config["trainer"], "max_epochs": None}  # the run's length is history
    config["model"] = without_downloads(config["model"])
    try:
        setup = set_up(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(  # its sections may hold anything
            f"expected the config of a run in '{checkpoint.path}', got {reason(error)} from it: "
            "the file was changed or is of another version; use another."
        ) from error
    _check_fit(checkpoint, setup)
    setup.captured.load_state_dict(checkpoint.state)
    setup.captured.eval()
    return setup


def _check_fit(checkpoint: Checkpoint, setup: Setup) -> None:
    expected, state = setup.captured.state_dict(), checkpoint.state
    different = sorted(expected.keys() ^ state.keys())
    if different:
        raise CheckpointError(
            f"expected the model that the config in '{checkpoint.path}' describes, got "
            f"{len(different)} names that differ, first '{different[0]}': use the version of the "
            "model and of qat that trained it."
        )
    others = [k for k in expected if state[k].dtype != expected[k].dtype]
    if others:
        raise _damaged(checkpoint.path, others[0], state[others[0]].dtype)
    wrong = [k for k in expected if state[k].shape != expected[k].shape]
    if not wrong:
        return
    classes, known = setup.data.num_classes, {state[k].shape[:1] for k in wrong}
    if len(known) == 1 and all(
        expected[k].shape == (classes, *state[k].shape[1:]) and state[k].ndim for k in wrong
    ):
        raise DataError(
            f"expected data with the {known.pop()[0]} classes that '{checkpoint.path}' was trained "
            f"on, got {classes}: choose other data."
        )
    raise CheckpointError(
        f"expected tensors of '{checkpoint.path}' that fit model and data, got {wrong[0]} of shape "
        f"{tuple(state[wrong[0]].shape)} instead of {tuple(expected[wrong[0]].shape)}: choose data "
        "like those of the run."
    )


def finish(model: Captured) -> str:
    """Take a quantized model to its fold stage, as the end of a training does.

    Args:
        model: A restored model; changed in place unless it is there already.

    Returns:
        The phase that it was in before.

    Raises:
        CalibrationError: If it is not quantized yet.
    """
    phase = phase_of(model)
    if not is_quantized(model):
        raise CalibrationError(
            f"expected a model whose weights and activations are quantized, got one in phase "
            f"'{phase}': let the run go on (ckpt_path=...) until everything is calibrated."
        )
    anneal(model, 1.0)
    for fake_quant in fake_quants(model):
        fake_quant.set_phase(Phase.FROZEN)
    fold(model)
    return phase

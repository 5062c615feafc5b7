"""Float checkpoints of any origin: found, unwrapped, checked, and only then copied into the model.

Files are read with ``weights_only=True`` and never otherwise: a pickle can run any code.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.errors import CheckpointError

NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
ADDED_BY_QAT = re.compile(
    r"(^activations|^views|\.weight_quant)\.|(^|\.)(_extra_state|weight_mask)$"
)
SHOWN = 5

State = dict[str, Tensor]


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a file into a model; the model is untouched if anything does not fit.

    A checkpoint of a quantized training brings its float weights; scales and phases stay behind.

    Args:
        model: The model; counters of batches (``num_batches_tracked``) may be missing in the file.
        path: A ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.safetensors`` file.

    Raises:
        CheckpointError: If the file cannot be read, or its names or shapes are not the model's.
    """
    expected = model.state_dict()
    layers = [_float_part(state) for state in _peel(_read(Path(path)))]
    # Names of the model itself may begin with "model.", so stop peeling as soon as they fit.
    state = next((s for s in layers if _names(s) == _names(expected)), layers[-1])
    _check_fit(expected, state, path)
    model.load_state_dict(state, strict=False)


def read_state_dict(path: str | Path) -> State:
    """Read the tensors of a checkpoint, without the wrapping that training tools add.

    Args:
        path: A ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.safetensors`` file with a state dict,
            bare or under ``state_dict``, ``model_state_dict``, ``model`` or ``net``.

    Returns:
        Tensors by name, on the CPU, without the prefixes of DataParallel, Lightning or compile.

    Raises:
        CheckpointError: If the file is missing, corrupt, unsafe or holds no tensors.
    """
    return list(_peel(_read(Path(path))))[-1]


def _read(path: Path) -> State:
    if not path.is_file():
        raise CheckpointError(
            f"expected a checkpoint file at {path}, but there is none; correct the path."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return _unwrap(content, path)


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from error


def read_pickle(path: Path) -> Any:
    """Read what ``torch.save`` wrote, as long as it is plain values and tensors.

    Raises:
        CheckpointError: If the file is corrupt or unsafe.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):  # The opcode that names a function or a class.
            raise _corrupt(path, error) from error
        raise CheckpointError(
            f"expected only tensors in {path}, but it contains Python code, which could do "
            f"anything when loaded ({_reason(error)}); if you trust its author, load "
            f"it elsewhere with weights_only=False and save just its state_dict with torch.save."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise _corrupt(path, error) from error


def _reason(error: Exception) -> str:
    """Return the sentence of a torch.load error that names the cause, without its advice."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return text.strip().partition("\n")[0][:200].rstrip(". ")


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"expected a PyTorch or safetensors checkpoint at {path}, but it cannot be read "
        f"({_reason(error) or type(error).__name__}); the file is cut off, damaged or of another "
        f"kind, so copy or download it again."
    )


def _unwrap(content: Any, path: Path) -> State:
    """Find the state dict in what a file held."""
    if isinstance(content, dict) and not _is_state(content):
        for key in NESTED_UNDER:
            if isinstance(content.get(key), dict):
                return _unwrap(content[key], path)
    if not isinstance(content, dict) or not _is_state(content):
        what = type(content).__name__
        if isinstance(content, dict):
            what = (
                f"a dict with {', '.join(str(k) for k in list(content)[:SHOWN]) or 'nothing in it'}"
            )
        raise CheckpointError(
            f"expected tensors by name in {path}, bare or under {', '.join(NESTED_UNDER)}, but it "
            f"holds {what}; save model.state_dict()."
        )
    return dict(content)


def _is_state(content: dict[Any, Any]) -> bool:
    return len(content) > 0 and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _peel(state: State) -> Iterator[State]:
    """Yield the state dict, then again after each prefix that all of its names share."""
    yield state
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            yield from _peel({key.removeprefix(prefix): value for key, value in state.items()})


def _float_part(state: State) -> State:
    """Drop what quantization-aware training added; a pruned weight becomes the one in use."""
    masks = {k.removesuffix("_mask"): v for k, v in state.items() if k.endswith(".weight_mask")}
    kept = {k: v for k, v in state.items() if not ADDED_BY_QAT.search(k)}
    return {k: v * masks[k] if k in masks else v for k, v in kept.items()}


def _names(state: State) -> set[str]:
    """Return the names that a file must have: a counter of batches changes no prediction."""
    return {name for name in state if not name.endswith("num_batches_tracked")}


def _check_fit(expected: State, state: State, path: str | Path) -> None:
    """Collect every difference between the model's tensors and those of the file."""
    missing = [k for k in expected if k in _names(expected) - state.keys()]
    unexpected = [k for k in state if k not in expected]
    misshaped = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    if not missing and not unexpected and not misshaped:
        return
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    found = "; ".join(_listed(kind, keys) for kind, keys in problems.items() if keys)
    is_head = bool(misshaped) and not missing and not unexpected and _only_classes(expected, state)
    hint = "the number of classes differs, so set num_classes to that of the checkpoint"
    other = "it was probably made by another architecture, so check model.name"
    raise CheckpointError(
        f"expected {path} to hold the {len(expected)} tensors of the model, but found {found}; "
        f"{hint if is_head else other}."
    )


def _listed(kind: str, keys: list[str]) -> str:
    more = f", ... {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:SHOWN])}{more}"


def _only_classes(expected: State, state: State) -> bool:
    """Whether all misfits belong to one layer and differ only in their first dimension."""
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    layers = {key.rpartition(".")[0] for key in wrong}
    return len(layers) == 1 and all(state[k].shape[1:] == expected[k].shape[1:] for k in wrong)

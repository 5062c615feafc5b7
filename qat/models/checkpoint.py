"""Float checkpoints of any origin: found, unwrapped, checked, and only then copied into the model.

Files are read with ``weights_only=True`` and never otherwise: a pickle can run any code.
"""

import mmap
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.errors import CheckpointError, printable
from qat.models.container import STATE_DICT, check_kind, corrupt, is_safetensors
from qat.models.values import check_dense, check_values

NESTED_UNDER = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
ADDED_BY_QAT = re.compile(
    r"(^activations|^views|\.weight_quant)\.|(^|\.)(_extra_state|weight_mask)$"
)
UNSAFE = re.compile(
    r"GLOBAL ([\w.]+)|unrecognized function|Can only (?:create|build)|must be imported"
)
SHOWN = 5
DEEPEST = 8  # wrappings inside one another

State = dict[str, Tensor]


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Copy the tensors of a file into a model; the model is untouched if anything does not fit.

    A checkpoint of a quantized training brings its float weights; scales and phases stay behind.

    Args:
        model: The model; counters of batches (``num_batches_tracked``) may be missing in the file.
        path: A ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.safetensors`` file.

    Raises:
        CheckpointError: If the file cannot be read, its names, shapes or types are not the
            model's, or its values are not finite.
    """
    expected = model.state_dict()
    layers = list(_peel(_read(Path(str(path)))))
    # Names of the model itself may begin with "model.", so stop peeling as soon as they fit.
    fitting = (s for s in layers if _names(_float_part(s)) == _names(expected))
    state = next(fitting, layers[-1])
    values = _float_part(state)
    _check_fit(expected, values, path)
    check_values(expected, values, path)
    masks = {f"{name}_mask": name for name in values if f"{name}_mask" in state}
    masked = {mask: expected[name] for mask, name in masks.items()}
    _check_fit(masked, {mask: state[mask] for mask in masks}, path)
    check_values(masked, {mask: state[mask] for mask in masks}, path)
    for mask, name in masks.items():  # a pruned weight becomes the one in use
        values[name] = values[name] * state[mask]
    model.load_state_dict(values, strict=False)


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
    check_kind(path)
    content = _read_safetensors(path) if is_safetensors(path) else read_pickle(path)
    return _unwrap(content, path)


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except Exception as error:  # of its own, and of torch where it has no such type
        raise corrupt(path, _reason(error)) from error


def read_pickle(path: Path) -> Any:
    """Read what ``torch.save`` wrote, as long as it is plain values and tensors.

    Raises:
        CheckpointError: If the file is missing, corrupt or unsafe.
    """
    check_kind(path)
    _refuse_bytearrays(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about formats of old
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise any kind
        if found := UNSAFE.search(str(error)):
            raise _unsafe(path, found[1] or "a call") from error
        raise corrupt(path, _reason(error)) from error


def _refuse_bytearrays(path: Path) -> None:
    """Refuse the one type that torch permits and that takes any amount of memory by a number."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray\n") >= 0:
            raise _unsafe(path, "bytearray")


def _unsafe(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"expected only tensors in {printable(path)}, but it contains Python code or objects "
        f"({printable(name)}), which could do anything when loaded; ask its author for a "
        f".safetensors file or for the state_dict alone ({STATE_DICT})."
    )


def _reason(error: Exception) -> str:
    """Return the sentence of an error that names the cause, without advice to load unsafely."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    sentence = text.strip().partition("\n")[0].partition(". ")[0]
    if "weights_only" in sentence or "safe_globals" in sentence:
        return "a format that torch does not read safely"
    return printable(sentence).rstrip(". ") or type(error).__name__


def _unwrap(content: Any, path: Path) -> State:
    """Find the state dict in what a file held."""
    content = _plain(content)
    for _ in range(DEEPEST):
        if not isinstance(content, dict) or _is_state(content):
            break
        inner = (content[key] for key in NESTED_UNDER if isinstance(content.get(key), dict))
        content = _plain(next(inner, content))
    if not isinstance(content, dict) or not _is_state(content):
        raise CheckpointError(
            f"expected tensors by name in {printable(path)}, bare or under "
            f"{', '.join(NESTED_UNDER)}, but it holds {_described(content)}; save "
            f"model.state_dict()."
        )
    check_dense(content, path)
    return {name: Tensor.detach(tensor) for name, tensor in content.items()}


def _plain(content: Any) -> Any:
    """Return a dict without the attributes that a file can give to an OrderedDict."""
    return dict(dict.items(content)) if isinstance(content, dict) else content


def _described(content: Any) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    if any(isinstance(value, Tensor) for value in content.values()):
        name, value = next((k, v) for k, v in content.items() if not _is_state({k: v}))
        return f"{type(value).__name__} under {_named(name)} beside tensors"
    return f"a dict with {', '.join(map(_named, list(content)[:SHOWN])) or 'nothing in it'}"


def _named(key: Any) -> str:
    """Return a key for a message; anything can be a key, and only text is sure to be short."""
    return printable(key, 60) if isinstance(key, str | int | float) else type(key).__name__


def _is_state(content: dict[Any, Any]) -> bool:
    return len(content) > 0 and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _peel(state: State) -> Iterator[State]:
    """Yield the state dict, then again after each prefix that all of its names share."""
    yield state
    for _ in range(DEEPEST):
        shared = (p for p in PREFIXES if all(key.startswith(p) for key in state))
        if (prefix := next(shared, None)) is None:
            return
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        yield state


def _float_part(state: State) -> State:
    """Drop what quantization-aware training added."""
    return {k: v for k, v in state.items() if not ADDED_BY_QAT.search(k)}


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
        f"expected {printable(path)} to hold the {len(expected)} tensors of the model, but found "
        f"{found}; {hint if is_head else other}."
    )


def _listed(kind: str, keys: list[str]) -> str:
    more = f", ... {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind}: {', '.join(printable(k, 90) for k in keys[:SHOWN])}{more}"


def _only_classes(expected: State, state: State) -> bool:
    """Whether all misfits belong to one layer and differ only in their first dimension."""
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    layers = {key.rpartition(".")[0] for key in wrong}
    return len(layers) == 1 and all(state[k].shape[1:] == expected[k].shape[1:] for k in wrong)

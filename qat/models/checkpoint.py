"""Float checkpoints of any origin: found, unwrapped, checked, and only then copied into the model.

Files are read with ``weights_only=True`` and never otherwise: a pickle can run any code.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from qat.errors import CheckpointError, printable
from qat.models.choice import choose, listed, where
from qat.models.container import check_kind, corrupt, is_safetensors
from qat.models.matching import Match, Target
from qat.models.pickles import HARMLESS, read_pickle, reason_of
from qat.models.places import Place, State, find_places, order
from qat.models.values import check_dense, check_values

log = logging.getLogger("qat")
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")
DEEPEST = 8  # prefixes in front of one another


def load_checkpoint(
    model: nn.Module, path: str | Path, key: str | None = None, *, new_head: bool = False
) -> None:
    """Copy the tensors of a file into a model; the model is untouched if anything does not fit.

    They may lie under any key and prefix, and beside others that training tools keep. A checkpoint
    of a quantized training brings its float weights; scales and phases stay behind.

    Args:
        model: The model; counters of batches (``num_batches_tracked``) may be missing in the file.
        path: A ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.safetensors`` file.
        key: Key or prefix under which the tensors lie, such as ``model_ema``, where the file holds
            several models; ``None`` prefers weights to their averages.
        new_head: Whether the last layer keeps its own values where the file has another number of
            classes for it, or has none.

    Raises:
        CheckpointError: If the file cannot be read, its names, shapes or types are not the
            model's, its values are not finite, or several models in it fit.
    """
    path, target = Path(str(path)), Target.of(model)
    places = find_places(_read(path), path)
    match, others = choose(target, places, path, key, new_head=new_head)
    dropped = set() if match.fits else match.head or set()
    values = {name: value for name, value in match.values.items() if name not in dropped}
    masks = {name: mask for name, mask in match.masks.items() if name in values}
    _check(values, masks, target, path)
    _say(match, others, places, dropped, path)
    for name, mask in masks.items():  # a pruned weight becomes the one in use
        values[name] = values[name] * mask
    model.load_state_dict(values, strict=False)


def read_state_dict(path: str | Path) -> State:
    """Read the tensors of a checkpoint, without the wrapping that training tools add.

    Args:
        path: A ``.pt``, ``.pth``, ``.th``, ``.ckpt`` or ``.safetensors`` file with a state dict,
            bare or under a key.

    Returns:
        Tensors by name, on the CPU, without the prefixes of DataParallel, Lightning or compile.

    Raises:
        CheckpointError: If the file is missing, corrupt, unsafe or holds no tensors.
    """
    content = _read(path := Path(path))
    places = find_places(content, path)
    is_bare = not places[0].keys and len(places[0].state) == len(content)
    state = places[0].state if is_bare else min(places, key=lambda p: order(p.keys)).state
    check_dense(state, path)
    for _ in range(DEEPEST):
        shared = (p for p in PREFIXES if all(name.startswith(p) for name in state))
        prefix = next(shared, "")
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read(path: Path) -> Any:
    check_kind(path)
    if not is_safetensors(path):
        return read_pickle(path, HARMLESS)
    try:
        return load_file(path)
    except Exception as error:  # of its own, and of torch where it has no such type
        raise corrupt(path, reason_of(error)) from error


def _check(values: State, masks: State, target: Target, path: Path) -> None:
    """Refuse what cannot be copied as it is."""
    check_dense({**values, **{f"{name}_mask": mask for name, mask in masks.items()}}, path)
    check_values(target.tensors, values, path)
    for name, mask in masks.items():
        if mask.shape != values[name].shape:
            raise CheckpointError(
                f"expected a mask of shape {tuple(values[name].shape)} for {printable(name)} in "
                f"{printable(path)}, got {tuple(mask.shape)}: start from another file."
            )
    check_values(target.tensors, masks, path)


def _say(
    match: Match, others: list[Match], places: list[Place], dropped: set[str], path: Path
) -> None:
    """Log which part of a file is used, wherever there was a choice."""
    tops = dict.fromkeys(place.keys[0] for place in places if place.keys)
    unused = [*match.unused, *(key for key in tops if key not in match.keys[:1])]
    if match.keys:
        log.info("start weights: those under %s of %s", where(match.keys), printable(path))
    if unused:
        log.info("not used of %s: %s", printable(path), listed(unused))
    if others:
        fitting = listed([where(m.keys) or "no key" for m in others])
        log.info("also fits, with other values: %s (choose with ckpt_key=...)", fitting)
    if dropped:
        log.warning("not from the file, and untrained: %s", listed(sorted(dropped)))

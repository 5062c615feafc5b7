"""Which of the tensors of a checkpoint a model starts from, or why none of them do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qat.errors import CheckpointError, printable
from qat.models.matching import Match, Target, find_matches, other_classes
from qat.models.places import SHOWN, Place, order
from qat.models.values import check_dense


def choose(
    target: Target, places: Sequence[Place], path: Path, key: str | None, *, new_head: bool
) -> tuple[Match, list[Match]]:
    """Return the tensors to start from, and others that would fit.

    Weights come before their averages, usual keys before others, no prefix before any.

    Args:
        target: The model.
        places: Where the file has tensors.
        path: The file, for messages.
        key: Key or prefix under which they have to lie, with dots; ``None`` for any.
        new_head: Whether the last layer may be another.

    Raises:
        CheckpointError: If none fit, or several that no key tells apart.
    """
    found = [match for place in places for match in find_matches(target, place)]
    named = [m for m in found if key is None or _lies_under(m.keys, key)]
    if not named:
        raise _no_key(key, found, path)
    fitting = [m for m in named if m.fits or (new_head and m.head)]
    fitting.sort(key=lambda m: (not m.fits, order(m.keys), len(m.keys)))
    used = {name for m in fitting for name in m.sources}
    whole = [m for m in fitting if key is not None or not m.is_small_beside(used)]
    if not whole:
        raise _misfit(max(fitting or named, key=lambda m: m.share), path)
    first, *others = whole
    others = [m for m in others if m.fits == first.fits and not _same(m, first)]
    _check_clear(first, others, path)
    return first, others


def where(keys: Sequence[str]) -> str:
    """Return a place as the user types it for ``ckpt_key``."""
    return printable(".".join(keys), 90)


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names of a file."""
    more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name, 90) for name in names[:SHOWN]) + more


def _lies_under(keys: Sequence[str], key: str) -> bool:
    """Whether ``key`` is part of a place: ``ema`` of ``ema.module``."""
    return f".{key}." in f".{'.'.join(keys)}."


def _same(first: Match, second: Match) -> bool:
    try:
        pairs = [(v, second.values[k]) for k, v in first.values.items() if k in second.values]
        return all(torch.equal(a, b) for a, b in pairs)
    except (RuntimeError, NotImplementedError):  # sparse, quantized, without values
        return False


def _check_clear(first: Match, others: list[Match], path: Path) -> None:
    """Refuse to choose between places of names that say nothing, such as two generators."""
    is_average, unknown, _ = order(first.keys)
    rivals = [m for m in others if unknown and order(m.keys)[:2] == (is_average, unknown)]
    if rivals:
        raise CheckpointError(
            f"expected the model once in {printable(path)}, but it fits under "
            f"{listed([where(m.keys) for m in (first, *rivals)])}, with other values in each; "
            f"choose one, such as ckpt_key={where(first.keys)}."
        )


def _no_key(key: str | None, found: Sequence[Match], path: Path) -> CheckpointError:
    near = sorted((m for m in found if m.keys and m.values), key=lambda m: m.share, reverse=True)
    places = listed(list(dict.fromkeys(where(m.keys) for m in near)))
    return CheckpointError(
        f"expected ckpt_key to be a key or prefix of {printable(path)}, got {printable(key)!r}; "
        f"{f'choose one of {places}' if places else 'the file has none, so leave it out'}."
    )


def _misfit(match: Match, path: Path) -> CheckpointError:
    """Return the error that says what fits, what does not, and what to do."""
    check_dense(match.values, path)
    tensors = match.target.tensors
    shapes = [
        f"{tuple(match.values[k].shape)} instead of {tuple(tensors[k].shape)}"
        for k in match.misshaped
    ]
    problems = {
        "missing": match.missing,
        "unexpected": match.unexpected,
        "of another shape": [f"{k} {s}" for k, s in zip(match.misshaped, shapes, strict=True)],
    }
    found = "; ".join(f"{len(n)} {kind}: {listed(n)}" for kind, n in problems.items() if n)
    found = found or "far more beside them"
    place = f" under {where(match.keys)}" if match.keys else ""
    return CheckpointError(
        f"expected {printable(path)} to hold the {len(tensors)} tensors of the model, but "
        f"{match.share[0]} fit{place}, and found {found}; {_remedy(match)}."
    )


def _remedy(match: Match) -> str:
    if match.fits:
        return f"if they are the model all the same, add ckpt_key={where(match.keys)}"
    counts = other_classes(match) if match.misshaped else None
    differs = f"the number of classes differs ({counts[0]}, not {counts[1]})" if counts else ""
    if match.head:
        why = differs or "the last layer is not in the file"
        return f"{why}: ckpt_new_head=true starts that layer anew and takes the rest"
    if differs and not match.values.keys() - set(match.misshaped):
        return f"{differs}, and no other layer fits, so check model.name and the data"
    return "it was probably made by another architecture, so check model.name"

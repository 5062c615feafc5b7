"""Which tensors of a checkpoint are a model's: names under any prefix, beside anything else.

The model must lie in the file whole. What training tools keep beside it (a criterion, metrics, a
teacher) is left alone; a layer that the model lacks is a sign of another architecture.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from qat.models.places import AVERAGE, Place, State, snake

ADDED_BY_QAT = re.compile(
    r"(^activations|^views|\.weight_quant)\.|(^|\.)(_extra_state|weight_mask)$"
)
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BESIDE = re.compile(
    r"(^|_)(criterion|criteria|loss|losses|metrics?|acc|accuracy|f1|auroc|iou|miou|precision|"
    r"recall|confmat|ema|swa|n_averaged|mean|std|normali[sz]er?|optimi[sz]er|total_ops|total_params)"
    r"(_|\d|$)"
)
"""First parts of names under which training tools keep something beside the model's layers."""
COUNTERS = ("total_ops", "total_params", "num_batches_tracked")
"""Last parts of names that count something and change no prediction."""
SEARCHED = 16  # prefixes of one place that are looked at more closely


@dataclass(frozen=True)
class Target:
    """The tensors of a model, as a file has to hold them.

    Args:
        tensors: Its state dict.
        computed: Names of buffers that it makes itself and does not save.
    """

    tensors: State
    computed: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """Return the target that a model is."""
        tensors = model.state_dict()
        computed = {name for name, _ in model.named_buffers()} - tensors.keys()
        return cls(tensors, frozenset(computed))

    @cached_property
    def needed(self) -> list[list[str]]:
        """Names that a file must have; of tied tensors, which share a list, one is enough."""
        tied: dict[object, list[str]] = {}
        for name, value in self.tensors.items():
            is_alone = value.is_meta or value.numel() == 0
            view = name if is_alone else (value.data_ptr(), value.shape, value.stride())
            if not name.endswith(COUNTERS):
                tied.setdefault(view, []).append(name)
        return list(tied.values())

    @cached_property
    def names(self) -> dict[str, str]:
        """Names without those of wrappers, to the model's own."""
        return {WRAPPERS.sub("", name): name for name in self.tensors}

    @cached_property
    def inner_names(self) -> dict[str, str]:
        """The same without what all of them begin with, for a model that is itself wrapped."""
        paths = [name.split(".") for name in self.names]
        common = 0
        while all(p[common:-1] and p[common] == paths[0][common] for p in paths):
            common += 1
        return {".".join(name.split(".")[common:]): own for name, own in self.names.items()}


@dataclass(frozen=True)
class Match:
    """Tensors of a file that have names of the model, under one prefix.

    Args:
        target: The model.
        keys: Where they lie: keys of the file, then the parts of the prefix.
        values: By the model's names; tied ones may be missing.
        masks: Masks of pruned weights, by the names of these.
        unexpected: Names, behind the prefix, of what seems to be part of another architecture.
        sources: Names in the file of what has names of the model.
        unused: Names in the file of what stands beside the model.
        strange: Those of ``unused`` that no training tool is known to add, to their elements.
    """

    target: Target
    keys: tuple[str, ...]
    values: State
    masks: State
    unexpected: tuple[str, ...]
    sources: tuple[str, ...]
    unused: tuple[str, ...]
    strange: Mapping[str, int]

    @cached_property
    def missing(self) -> list[str]:
        """Names of the model that the file does not have."""
        return [n for tied in self.target.needed if not self.values.keys() & tied for n in tied]

    @cached_property
    def misshaped(self) -> list[str]:
        """Names of the model whose tensors in the file have another shape."""
        tensors = self.target.tensors
        return [k for k, v in self.values.items() if v.is_nested or v.shape != tensors[k].shape]

    @property
    def fits(self) -> bool:
        """Whether the file holds the model, and nothing that seems to belong to another."""
        return not (self.missing or self.misshaped or self.unexpected)

    @property
    def share(self) -> tuple[int, int]:
        """How near this is to the model: tensors of the right shape, and unexpected ones."""
        return len(self.values) - len(self.misshaped), -len(self.unexpected)

    def is_small_beside(self, others: Container[str]) -> bool:
        """Whether the file holds more than the model, leaving ``others`` of its names out."""
        beside = sum(count for name, count in self.strange.items() if name not in others)
        return 0 < sum(v.numel() for v in self.target.tensors.values()) <= beside

    @cached_property
    def head(self) -> set[str] | None:
        """Names of the model's last layer, where that alone keeps file and model apart.

        A model of one layer has no other part to take.
        """
        classes, layers = other_classes(self), _layers(self.misshaped)
        if self.misshaped and (classes is None or len(layers) > 2):
            return None
        layers = layers or {_last_layer(self.target.tensors)}
        inside = tuple(f"{layer}." for layer in layers)
        others = [k for k in self.unexpected if not k.startswith(inside)]
        if others or not _layers(self.missing) <= layers:
            return None
        head = {name for name in self.target.tensors if name.rpartition(".")[0] in layers}
        return head if self.values.keys() - head else None


def other_classes(match: Match) -> tuple[int, int] | None:
    """Return how many classes file and model have, if that is all that keeps shapes apart."""
    found = set()
    for name in match.misshaped:
        value, expected = match.values[name], match.target.tensors[name]
        if value.is_nested or value.ndim == 0 or value.shape[1:] != expected.shape[1:]:
            return None
        found.add((value.shape[0], expected.shape[0]))
    return found.pop() if len(found) == 1 else None


def _layers(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _last_layer(tensors: State) -> str:
    weights = [name for name, value in tensors.items() if value.ndim > 1]
    return weights[-1].rpartition(".")[0] if weights else ""


def find_matches(target: Target, place: Place) -> list[Match]:
    """Return what the tensors of one place are of a model, under each prefix that its names have.

    Args:
        target: The model.
        place: Tensors of the file.
    """
    plain = {WRAPPERS.sub("", name): name for name in place.state}
    if len(plain) < len(place.state):  # with and without a wrapper
        plain = {name: name for name in place.state}
    found: dict[str, tuple[int, Mapping[str, str]]] = {"": (0, target.names)}
    for names in (target.names, target.inner_names):
        for prefix, hits in _prefixes(plain, names).items():
            if hits > found.get(prefix, (0, names))[0]:
                found[prefix] = hits, names
    return [_match(target, place, plain, prefix, names) for prefix, (_, names) in found.items()]


def _prefixes(plain: Iterable[str], names: Mapping[str, str]) -> dict[str, int]:
    """Return what stands in front of names of the model, and how many of these it has."""
    hits: dict[str, int] = defaultdict(int)
    depths = {name.count(".") + 1 for name in names}
    for name in plain:
        for depth in depths:
            last = ".".join(name.rsplit(".", depth)[-depth:])
            if last in names and last.count(".") + 1 == depth:
                hits[name.removesuffix(last)] += 1
    best = sorted(hits, key=lambda prefix: -hits[prefix])[:SEARCHED]
    return {prefix: hits[prefix] for prefix in best}


def _match(
    target: Target, place: Place, plain: Mapping[str, str], prefix: str, names: Mapping[str, str]
) -> Match:
    inside = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
    values = {own: place.state[inside[k]] for k, own in names.items() if k in inside}
    masks = {names[k]: place.state[inside[m]] for k in names if (m := f"{k}_mask") in inside}
    kept = {*names, *target.computed}
    others = [k for k in inside if k not in kept and not ADDED_BY_QAT.search(k)]
    tops = {name.partition(".")[0] for name in names}
    beside = [k for k in others if _is_beside(k, tops)]
    outside = [k for k in plain if not k.startswith(prefix)]
    strange = [plain[k] for k in outside if not _is_beside(_behind(k, prefix), set())]
    return Match(
        target,
        (*place.keys, *prefix.split(".")[:-1]),
        values,
        {name: mask for name, mask in masks.items() if name in values},
        tuple(k for k in others if k not in beside),
        tuple(inside[k] for k in names if k in inside),
        (*(inside[k] for k in beside), *(plain[k] for k in outside)),
        {name: place.state[name].numel() for name in strange},
    )


def _behind(name: str, prefix: str) -> str:
    """Return a name from the first part on that is not that of a prefix."""
    parts, shared = name.split("."), prefix.split(".")
    same = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(parts, shared, strict=False)
        )
    )
    return ".".join(parts[same:])


def _is_beside(name: str, tops: Container[str]) -> bool:
    """Whether a name that the model lacks is of what training tools keep beside it."""
    top, _, rest = name.partition(".")
    if name.endswith(COUNTERS):
        return True
    word = snake(top)
    return top not in tops and bool(BESIDE.search(word) or (rest and AVERAGE.search(word)))

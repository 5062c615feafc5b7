"""What rules say and nobody hears: bits that later rules replace at every site, and the like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from qat.spec import FLOAT, Patch, Scheme

KINDS = ("weight", "activation")


class Effects:
    """Which rules met where, and so which of their values are in force anywhere.

    Args:
        scheme: Named rules in order, of which later ones win, field by field.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.met: dict[str, set[tuple[str, ...]]] = {kind: set() for kind in KINDS}

    def record(self, matching: Sequence[str], kind: str) -> None:
        """Take down that these rules, in order, match one site.

        Args:
            matching: Their names.
            kind: ``"weight"`` or ``"activation"``.
        """
        self.met[kind].add(tuple(matching))

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yield the names of rules with what has no effect there, and why.

        A rule that matches nothing at all is an error elsewhere.
        """
        matching = {name for met in self.met.values() for names in met for name in names}
        for name, rule in self.scheme.rules.items():
            for kind in KINDS if name in matching else ():
                patch = getattr(rule, kind)
                meetings = [names for names in self.met[kind] if name in names]
                if patch and not meetings and not rule.optional:
                    yield (
                        name,
                        f"{kind} has no effect, as the rule matches no {kind}: correct match",
                    )
                elif patch and meetings:
                    yield from ((name, why) for why in self._lost(name, kind, patch, meetings))

    def _lost(
        self, name: str, kind: str, patch: Patch, meetings: Iterable[tuple[str, ...]]
    ) -> Iterator[str]:
        """Yield what others replace of one rule wherever they meet it: bits, or float."""
        winners: dict[str, set[str]] = defaultdict(set)
        fields = ["bits"] if isinstance(patch, Mapping) and "bits" in patch else []
        fields += [FLOAT] if patch == FLOAT else []
        for names in meetings:
            for field in fields:
                winners[field].add(self._winner(names[names.index(name) :], kind, field))
        for field, rules in winners.items():
            if name not in rules:
                value = FLOAT if patch == FLOAT else f"bits={_value(patch, field)}"
                others = ", ".join(sorted(rules))
                yield (
                    f"{kind} {value} has no effect, as {others} wins wherever it matches: change "
                    "that rule, or remove the value"
                )

    def _winner(self, names: Sequence[str], kind: str, field: str) -> str:
        """Return the last rule that has another value for a field; the first one if none has."""
        first = getattr(self.scheme.rules[names[0]], kind)
        winner, value = names[0], _value(first, field)
        for name in names[1:]:
            patch = getattr(self.scheme.rules[name], kind)
            if patch is not None and (patch == FLOAT or field == FLOAT or field in patch):
                same = _value(patch, field) == value
                winner = names[0] if same else name
        return winner


def _value(patch: Patch, field: str) -> object:
    return patch if not isinstance(patch, Mapping) or field == FLOAT else patch.get(field)

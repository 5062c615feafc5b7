"""Residual streams: what an addition reads may keep more bits than what a layer reads of it.

A stream that every block rounds to two bits forgets what it carries, so published methods of few
bits leave it in float. Here additions read one grid, and a second fake-quant behind it gives the
layers theirs: codes that a chip rescales.
"""

from __future__ import annotations

from torch import fx

from qat.graph.plan import Branch
from qat.graph.sites import Group, Sites


def by_kind(sites: Sites, group: Group) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the readers of a group: element by element (additions, products), and the others."""
    sums = [n for n in group.readers if sites.op(n).elementwise]
    return sums, [n for n in group.readers if n not in sums]


def branch_off(sites: Sites, group: Group, site: str) -> dict[str, Branch]:
    """Return where the layers that read a group get their own fake-quant: in front of each.

    Args:
        sites: The graph.
        group: The tensors.
        site: The name of the site of the layers.
    """
    _, layers = by_kind(sites, group)
    readers: dict[str, list[str]] = {}
    for layer in dict.fromkeys(layers):
        for source in sites.tensor_inputs(layer):
            is_whole = source not in sites.rewritten
            if is_whole and sites.root(source) is sites.root(group.producers[0]):
                readers.setdefault(source.name, []).append(layer.name)
    return {name: Branch(site, tuple(found)) for name, found in readers.items()}

"""The groups by name. Every other part of the program asks here, and compares no names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from slimdiff.groups.attention import QueryKey, ValueOutput
from slimdiff.groups.feed_forward import FeedForwardGroup
from slimdiff.groups.group import Group, Site
from slimdiff.groups.resnet import Resnet
from slimdiff.groups.values import Values

GROUPS: dict[str, Group[Any]] = {}
"""Every group by its name; at a module that several are found at, sites come in this order."""


def register(group: Group[Any]) -> None:
    """Make a group known. One from outside this package has to be known before its plans and slim models are opened.

    Raises:
        ValueError: if there is one of this name.
    """
    if group.name in GROUPS:
        raise ValueError(f"there is a group {group.name} already")
    GROUPS[group.name] = group


for _group in (QueryKey(), ValueOutput(), FeedForwardGroup(), Values(), Resnet()):
    register(_group)


def fault_in(names: Sequence[str]) -> str | None:
    """What is wrong with slimming these groups alone: one is not known, or shares its rank with one that is missing."""
    for name in names:
        if name not in GROUPS:
            return f"there is no group {name!r}: the groups are {', '.join(GROUPS)}"
        both = [other for other in GROUPS if other in (name, *GROUPS[name].shares_rank_with)]
        if not set(names).issuperset(both):
            return f"{' and '.join(both)} share one rank per layer: name both or neither"
    return None


def find_sites(denoiser: nn.Module) -> tuple[list[Site], list[dict[str, str]]]:
    """Every site of a denoiser in the order of its modules, and those that must stay dense.

    Returns:
        the sites, and `{"site": path, "reason": text}` for modules of these kinds that cannot be slimmed.
    """
    sites: list[Site] = []
    left_dense: list[dict[str, str]] = []
    for path, module in denoiser.named_modules():
        found = [group.site(path, module) for group in GROUPS.values()]
        sites += [site for site in found if isinstance(site, Site)]
        reasons = dict.fromkeys(reason for reason in found if isinstance(reason, str))
        left_dense += [{"site": path, "reason": reason} for reason in reasons]
    return sites, left_dense

"""A slim model with every shape right and no value: what counting and timing need, before calibration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from slimdiff.groups import GROUPS, find_sites
from slimdiff.plan import Plan, site_plan
from slimdiff.slimming.slim import assemble


@torch.no_grad()
def skeleton(denoiser: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """The dense model cut to these ranks (by module path), the first dimensions of each head or group kept.

    Weights that no rank changes are shared with the dense model.

    Raises:
        InputError: if it is slim already, or of a class that has no slim one.
    """
    sites, left_dense = find_sites(denoiser)
    total = sum(p.numel() for p in denoiser.parameters())
    plan = Plan(
        model_class=type(denoiser).__name__,
        model_hash="",
        allocation="none",
        align=1,
        parameters={"dense": total, "slim": total},
        sites={s.name: site_plan(s, ranks.get(s.path, s.dense_rank)) for s in sites},
        left_dense=left_dense,
    )
    return assemble(denoiser, plan, lambda module, site, rank: GROUPS[site.group].cut(module, site, site.first(rank)))

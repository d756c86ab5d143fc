"""A slim model with every shape right and no value: what counting and timing need, before calibration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimdiff.groups.resnet import sliced
from slimdiff.groups.sites import Site, attention_linears, feed_forward_linears, find_sites
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
    return assemble(denoiser, plan, _first)


def _first(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
    if site.group == "resnet":
        channels = torch.arange(site.dense_rank).unflatten(0, (site.multiple, -1))
        return sliced(module, channels[:, : rank // site.multiple].flatten())
    outputs: dict[str, nn.Linear] = {}
    if site.group == "feed_forward":
        up, down, gated = feed_forward_linears(module)
        inputs, outputs, blocks = {"net.0.proj": up}, {"net.2": down}, 2 if gated else 1
    else:
        query, key, value, output = attention_linears(module)
        inputs, blocks = {"to_q": query, "to_k": key}, site.heads
        if site.group == "value_output":
            inputs, outputs = {"to_v": value}, {"to_out.0": output}
    weights = {
        f"{name}.{kind}": parameter.unflatten(0, (blocks, site.dense_rank))[:, :rank].flatten(0, 1)
        for name, linear in inputs.items()
        for kind, parameter in linear.named_parameters()
    }
    for name, linear in outputs.items():
        columns = linear.weight.unflatten(1, (site.heads, site.dense_rank))[:, :, :rank]
        weights[f"{name}.weight"] = columns.flatten(1, 2)
    return weights

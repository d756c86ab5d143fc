"""The `feed_forward` group: channels between the layers of a perceptron, with their gate rows if any (`mlps.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.algebra import elimination
from slimdiff.algebra.elimination import ChannelOrder
from slimdiff.groups.group import Evidence, Group, Inner, Site, solved, wide
from slimdiff.groups.maps import AxisMap, LayerMap, Maps
from slimdiff.groups.mlps import layout


class FeedForwardGroup(Group[ChannelOrder]):
    """Channels are eliminated by what their loss does to the output, and the down projection is solved again.

    Where it receives attention's output, too, that stays and helps to make up for what is removed.
    """

    name = "feed_forward"
    inner = {"net.0.proj": Inner(0, times=(2, 1)), "net.2": Inner(1)}
    added = ("net.2",)

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        layers = layout(module)
        if layers is None or isinstance(layers, str):
            return layers
        _, down, joined = self._down(module)
        width = down.weight.shape[1]
        site = self.at(path, module, width - joined)
        return replace(site, received=(width,)) if joined else site

    def layout(self, module: nn.Module) -> Mapping[str, Inner]:
        layers = layout(module)
        return layers if isinstance(layers, dict) else {}

    def mended(self, module: nn.Module) -> str | None:
        return self._down(module)[0]

    def resize(self, module: nn.Module, site: Site, rank: int) -> None:
        super().resize(module, site, rank)
        if hasattr(module, "mlp_hidden_dim"):  # by which some split what a fused projection gives
            module.mlp_hidden_dim = rank  # type: ignore[assignment]

    def factor(self, evidence: Evidence) -> ChannelOrder:
        _, down, joined = self._down(evidence.module)
        moment, _ = evidence.received(down)
        weight = wide(down.weight).flatten(1)
        by_leverage = evidence.forms.channels == "ridge_leverage"
        choose = elimination.leverage_order if by_leverage else elimination.elimination_order
        share = 1.0
        if joined:
            moment, share = elimination.without(moment, weight, joined)
            weight = weight[:, joined:]
        if evidence.site.dense_rank > elimination.EXACT_CHANNELS:
            moment = moment.float()  # as it was summed: an order needs no more, and half the memory
        order = choose(moment, weight)
        return order._replace(tail=order.tail * share)

    def slim(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        kept = factor.order[:rank].sort().values
        weights = {name: wide(weight) for name, weight in self.cut(evidence.module, evidence.site, kept).items()}
        return weights | self._solved(evidence, kept)

    def maps(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> Maps:
        path, down, joined = self._down(evidence.module)
        kept, rest = (part.sort().values for part in (factor.order[:rank], factor.order[rank:]))
        maps: Maps = {}
        for name, layer, inner in self.layers(evidence.module):
            if inner.axis == 0:
                width = (layer.weight.shape[0] - inner.before) // evidence.site.dense_rank
                parts = torch.arange(width)[:, None] * evidence.site.dense_rank
                rows = torch.cat([torch.arange(inner.before), (kept + parts).flatten() + inner.before])
                maps[name] = LayerMap(AxisMap(rows.int()))
        kept, rest = torch.cat([torch.arange(joined), kept + joined]), rest + joined
        moment, mean = evidence.received(down)
        unit = torch.zeros(len(rest), len(moment), dtype=torch.float64)
        unit[torch.arange(len(rest)), rest] = 1.0
        mixed = elimination.solve_down(moment, unit, kept)  # of the removed channels alone: what is kept stays
        into = AxisMap(kept.int(), rest.int(), mixed)
        if mean is not None:
            into.mean = torch.zeros_like(mean)
            into.mean[rest] = mean[rest] - mixed @ mean[kept]
            into.ones = elimination.closest_to_one(moment, mean, kept)
        return maps | {path: LayerMap(None, into)}

    def emulate(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        path, down, joined = self._down(evidence.module)
        kept = factor.order[:rank]
        weights = self._solved(evidence, kept)
        weight = torch.zeros(down.weight.shape, dtype=torch.float64)
        weight[:, torch.cat([torch.arange(joined), kept + joined])] = weights[f"{path}.weight"]
        return {**weights, f"{path}.weight": weight}

    def _down(self, module: nn.Module) -> tuple[str, Any, int]:
        """The path of the down projection, it itself, and how many of its columns are attention's."""
        return next((path, layer, inner.before) for path, layer, inner in self.layers(module) if inner.axis == 1)

    def _solved(self, evidence: Evidence, kept: Tensor) -> dict[str, Tensor]:
        """The down projection solved on the kept channels, and its bias if that changes."""
        path, down, joined = self._down(evidence.module)
        moment, mean = evidence.received(down)
        kept = torch.cat([torch.arange(joined), kept + joined])
        weight = elimination.solve_down(moment, wide(down.weight).flatten(1), kept)
        weight = weight.unflatten(1, (-1, *down.weight.shape[2:]))
        return solved(path, down, weight, mean, lambda mean: mean[kept])

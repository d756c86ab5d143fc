"""The `feed_forward` group: channels between the two linears of a `FeedForward`, with their gate rows if any."""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from slimdiff.algebra import elimination
from slimdiff.algebra.elimination import ChannelOrder
from slimdiff.groups.group import Evidence, Group, Inner, Site, solved, wide
from slimdiff.groups.maps import AxisMap, LayerMap, Maps

_GATED = ("GEGLU", "SwiGLU")
_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")


class FeedForwardGroup(Group[ChannelOrder]):
    """Channels are eliminated by what their loss does to the output, and the down projection is solved again."""

    name = "feed_forward"
    inner = {"net.0.proj": Inner(0, times=(2, 1)), "net.2": Inner(1)}
    compensated = "net.2"
    added = ("net.2",)

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        if not isinstance(module, FeedForward):
            return None
        up, down = module.net[0], module.net[2]
        activation = type(up).__name__
        if activation not in _GATED + _PLAIN:
            return f"its activation {activation} is not one of {', '.join(_GATED + _PLAIN)}"
        if type(up.proj) is not nn.Linear or type(down) is not nn.Linear:
            return "a projection is not a plain linear layer"
        return self.at(path, module, down.in_features)

    def factor(self, evidence: Evidence) -> ChannelOrder:
        down = evidence.module.net[2]
        moment, _ = evidence.received(down)
        if evidence.site.dense_rank > elimination.EXACT_CHANNELS:
            moment = moment.float()  # as it was summed: an order needs no more, and half the memory
        by_leverage = evidence.forms.channels == "ridge_leverage"
        choose = elimination.leverage_order if by_leverage else elimination.elimination_order
        return choose(moment, wide(down.weight))

    def slim(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        kept = factor.order[:rank].sort().values
        weights = {name: wide(weight) for name, weight in self.cut(evidence.module, evidence.site, kept).items()}
        return weights | _down(evidence, kept)

    def maps(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> Maps:
        kept, rest = (part.sort().values for part in (factor.order[:rank], factor.order[rank:]))
        up, down = evidence.module.net[0].proj, evidence.module.net[2]
        moment, mean = evidence.received(down)
        unit = torch.zeros(len(rest), len(moment), dtype=torch.float64)
        unit[torch.arange(len(rest)), rest] = 1.0
        mixed = elimination.solve_down(moment, unit, kept)  # of the removed channels alone: what is kept stays
        into = AxisMap(kept.int(), rest.int(), mixed)
        if mean is not None:
            into.mean = torch.zeros_like(mean)
            into.mean[rest] = mean[rest] - mixed @ mean[kept]
            into.ones = elimination.closest_to_one(moment, mean, kept)
        parts = torch.arange(up.out_features // evidence.site.dense_rank)[:, None] * evidence.site.dense_rank
        rows = (kept + parts).flatten().int()
        return {"net.0.proj": LayerMap(AxisMap(rows)), "net.2": LayerMap(None, into)}

    def emulate(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        kept = factor.order[:rank]
        weights = _down(evidence, kept)
        weight = torch.zeros(evidence.module.net[2].weight.shape, dtype=torch.float64)
        weight[:, kept] = weights["net.2.weight"]
        return {**weights, "net.2.weight": weight}


def _down(evidence: Evidence, kept: Tensor) -> dict[str, Tensor]:
    """The down projection solved on the kept channels, and its bias if that changes."""
    down = evidence.module.net[2]
    moment, mean = evidence.received(down)
    weight = elimination.solve_down(moment, wide(down.weight), kept)
    return solved("net.2", down, weight, mean, lambda mean: mean[kept])

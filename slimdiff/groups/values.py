"""The `values` group: values and output projections of attention whose queries and keys stay dense.

Heads of unequal sizes have no fused kernel, and processors read one head size off the module. So slim values are filled
up with zeros to the head's size before attention, and the zeros are left out before the output projections: exact, with
every processor, and attention's own products cost what they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from slimdiff.algebra import low_rank
from slimdiff.algebra.low_rank import HeadBases
from slimdiff.groups import obstacles
from slimdiff.groups.group import Evidence, Group, Inner, Site, projected, solved, wide
from slimdiff.statistics import Statistics

if TYPE_CHECKING:
    from slimdiff.calibration.observer import Observer

_OUTPUTS = {"to_out.0": "", "to_add_out": "added"}
"""Output projections, and what the moments of what they receive are called below the site's name."""


class FilledUp(nn.Linear):
    """Gives heads of `rank` dimensions, each filled up with zeros to `size`."""

    rank: int
    size: int

    def forward(self, input: Tensor) -> Tensor:
        heads = super().forward(input).unflatten(-1, (-1, self.rank))
        return F.pad(heads, (0, self.size - self.rank)).flatten(-2)


class LeavingOut(nn.Linear):
    """Receives what `FilledUp` gave, mixed over tokens: heads of `size` dimensions with zeros from `rank` on."""

    rank: int
    size: int

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.unflatten(-1, (-1, self.size))[..., : self.rank].flatten(-2))


def is_filled_up(module: nn.Module) -> bool:
    """Whether a model has slim values among dense queries and keys."""
    return any(isinstance(layer, FilledUp) for layer in module.modules())


class Values(Group[HeadBases]):
    """One basis a head for all streams of tokens, and each stream's output projection solved again on it."""

    name = "values"
    per_head = True
    fills_up = True
    inner = {"to_v": Inner(0), "to_out.0": Inner(1)}

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        if not isinstance(module, Attention | AttentionModuleMixin):
            return None
        if obstacles.of_queries(module) is None or obstacles.of_values(module) is not None:
            return None  # slimmed with queries and keys, or listed as theirs is
        out: Any = module.to_out[0]  # type: ignore[index]
        size = out.in_features // module.heads  # type: ignore[operator]
        site = self.at(path, module, size, module.to_v.out_features // size)  # type: ignore[union-attr,operator]
        outputs = [layer for layer, inner in self.layout(module).items() if inner.axis == 1]
        return replace(site, received=(out.in_features,) * len(outputs))

    def layout(self, module: nn.Module) -> Mapping[str, Inner]:
        receives = Inner(1, (module.to_out[0].in_features // module.to_v.out_features,))  # type: ignore
        layers = {"to_v": Inner(0), "add_v_proj": Inner(0), "to_out.0": receives, "to_add_out": receives}
        return {name: inner for name, inner in layers.items() if getattr(module, name.partition(".")[0], None)}

    def resize(self, module: nn.Module, site: Site, rank: int) -> None:
        super().resize(module, site, rank)
        if rank < site.dense_rank:
            for _, layer, inner in self.layers(module):
                layer.__class__ = LeavingOut if inner.axis else FilledUp
                layer.rank, layer.size = rank, site.dense_rank

    def watch(self, module: nn.Module, site: Site, observer: Observer) -> list[Any]:
        def hook(what: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            observer.add_rows(site, x.reshape(-1, *x.shape[-2:]), what)

        outputs = [(path, layer) for path, layer, inner in self.layers(module) if inner.axis == 1]
        return [layer.register_forward_pre_hook(partial(hook, _OUTPUTS[path])) for path, layer in outputs]

    def sums(self, site: Site) -> dict[str, tuple[int, ...]]:
        names = (site.name, f"{site.name}.added")
        return {name: (width,) for name, width in zip(names, site.widths, strict=False)}

    def covers(self, site: Site, statistics: Statistics) -> bool:
        return all(statistics.tokens.get(name) for name in self.sums(site))

    def factor(self, evidence: Evidence) -> HeadBases:
        heads = evidence.site.heads
        paths = []
        for name, layer, moment, _ in self._received(evidence):
            blocks = low_rank.head_blocks(moment, evidence.module.heads)
            weights = wide(layer.weight).T.reshape(len(blocks), -1, layer.out_features)
            tokens = evidence.statistics.population[name]
            # Query heads that share a head of values are paths of it, side by side.
            shared = len(blocks) // heads
            for i in range(shared):
                paths.append((blocks[i::shared], weights[i::shared], tokens))
        return low_rank.shared_values(paths)

    def slim(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        basis = factor.left[..., :rank]
        weights: dict[str, Tensor] = {}
        for path, layer, inner in self.layers(evidence.module):
            if inner.axis == 0:
                weights |= projected(path, layer, basis)
        return weights | self._outputs(evidence, basis)

    def emulate(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        basis = factor.left[..., :rank]
        back = torch.block_diag(*self._of_queries(evidence, basis)).T
        weights = self._outputs(evidence, basis)
        return {name: w @ back if name.endswith("weight") else w for name, w in weights.items()}

    def _received(self, evidence: Evidence) -> list[tuple[str, Any, Tensor, Tensor | None]]:
        """Of each output projection: the sums' name, it itself, and the moment and mean of what it receives."""
        site, found = evidence.site, []
        for path, layer, inner in self.layers(evidence.module):
            if inner.axis == 1:
                what = _OUTPUTS[path]
                found.append((f"{site.name}.{what}" if what else site.name, layer, *evidence.received(layer, what)))
        return found

    def _of_queries(self, evidence: Evidence, basis: Tensor) -> Tensor:
        """A basis `[H, d, r]` of heads of values for each query head."""
        return basis.repeat_interleave(evidence.module.heads // len(basis), 0)

    def _outputs(self, evidence: Evidence, basis: Tensor) -> dict[str, Tensor]:
        """The output projections solved on the basis, and their biases if those change."""
        basis = self._of_queries(evidence, basis)
        kept = torch.block_diag(*basis).T
        weights: dict[str, Tensor] = {}
        paths = [path for path, _, inner in self.layers(evidence.module) if inner.axis == 1]
        for path, (_, layer, moment, mean) in zip(paths, self._received(evidence), strict=True):
            joint = moment if evidence.forms.joint_output else low_rank.head_blocks(moment, len(basis))
            weight = low_rank.solve_output(joint, wide(layer.weight), basis)
            weights |= solved(path, layer, weight, mean, lambda mean: kept @ mean)
        return weights

"""The `query_key` and `value_output` groups: head dimensions of an `Attention`, found by type and never by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from slimdiff.algebra import elimination, low_rank
from slimdiff.algebra.low_rank import HeadBases
from slimdiff.groups import obstacles
from slimdiff.groups.group import Evidence, Group, Inner, Site, projected, solved, wide
from slimdiff.groups.maps import AxisMap, LayerMap, Maps, project
from slimdiff.statistics import Statistics

if TYPE_CHECKING:
    from slimdiff.calibration.observer import Observer


class _AttentionGroup(Group[HeadBases]):
    """What both have in common. They keep the same rank in a layer, so what hinders one leaves all of it dense."""

    per_head = True
    compensated = "to_out.0"
    added = ("to_out.0",)

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        if not isinstance(module, Attention | AttentionModuleMixin):
            return None
        if (reason := obstacles.of_queries(module)) is not None:
            return reason if obstacles.of_values(module) else f"values alone are slimmed: {reason}"
        return self.at(path, module, module.inner_dim // module.heads, module.heads)  # type: ignore[operator]

    def resize(self, module: Attention, site: Site, rank: int) -> None:
        """Attention keeps its stock processors: they divide by the root of the *new* head dimension."""
        super().resize(module, site, rank)
        module.inner_dim = module.inner_kv_dim = site.heads * rank
        module.scale = rank**-0.5


class QueryKey(_AttentionGroup):
    """Queries and keys: scores are closest with the whitened SVD of their product, in head space."""

    name = "query_key"
    inner = {"to_q": Inner(0), "to_k": Inner(0)}
    shares_rank_with = ("value_output",)
    product_dim = "query_key_dim"

    def watch(self, module: Attention, site: Site, observer: Observer) -> list[Any]:
        handle, attended_of = _watch_mask(module)

        def of_query(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            observer.add_heads(site, "query", output.detach())

        def of_key(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            keys, attended = output.detach(), attended_of(output)
            # Over an image's tokens: softmax does not see what all keys of an image have in common.
            mean = _mean(keys, attended)
            observer.add_heads(site, "key_mean", mean)
            observer.add_heads(site, "key", keys, attended, mean)

        return [handle, module.to_q.register_forward_hook(of_query), module.to_k.register_forward_hook(of_key)]

    def sums(self, site: Site) -> dict[str, tuple[int, ...]]:
        heads = (site.heads, site.dense_rank, site.dense_rank)
        return {f"{site.name}.{what}": heads for what in ("query", "key", "key_mean")}

    def covers(self, site: Site, statistics: Statistics) -> bool:
        return all(statistics.tokens.get(f"{site.name}.{what}") for what in ("query", "key"))

    def factor(self, evidence: Evidence) -> HeadBases:
        key = evidence.moment("key")
        if not evidence.forms.centre_keys:
            key = key + evidence.moment("key_mean")
        return low_rank.query_key(evidence.moment("query"), key)

    def slim(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        # The stock processor will divide by sqrt(rank): fold in what makes that the dense scale.
        left = factor.left[..., :rank] * (rank / evidence.site.dense_rank) ** 0.5
        to_q, to_k = evidence.module.to_q, evidence.module.to_k
        return {**projected("to_q", to_q, left), **projected("to_k", to_k, factor.right[..., :rank])}

    def maps(self, evidence: Evidence, rank: int, factor: HeadBases) -> Maps:
        left = factor.left[..., :rank] * (rank / evidence.site.dense_rank) ** 0.5
        return {"to_q": LayerMap(AxisMap(left)), "to_k": LayerMap(AxisMap(factor.right[..., :rank]))}

    def emulate(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        left, right = factor.left[..., :rank], factor.right[..., :rank]
        return projected("to_q", evidence.module.to_q, left @ right.mT)  # q L (k R)^T = (q L R^T) k^T

    def macs(self, module: Attention, site: Site, add: Callable[[int], None]) -> list[Any]:
        """The projections', and those of Q K^T and A V: for each head, every query with every key, once each."""
        queries: list[int] = []

        def of_query(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            queries[:] = output.shape[:2]

        def of_key(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            batch, count = queries
            add(2 * batch * site.heads * count * output.shape[1])

        products = [module.to_q.register_forward_hook(of_query), module.to_k.register_forward_hook(of_key)]
        return super().macs(module, site, add) + products


class ValueOutput(_AttentionGroup):
    """Values and the output projection, which is solved again on the bases that are kept."""

    name = "value_output"
    inner = {"to_v": Inner(0), "to_out.0": Inner(1)}
    shares_rank_with = ("query_key",)
    product_dim = "value_dim"

    def watch(self, module: Attention, site: Site, observer: Observer) -> list[Any]:
        handle, attended_of = _watch_mask(module)

        def of_value(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            observer.add_heads(site, "value", output.detach(), attended_of(output))

        values = module.to_v.register_forward_hook(of_value)
        return [handle, values, *super().watch(module, site, observer)]

    def sums(self, site: Site) -> dict[str, tuple[int, ...]]:
        return super().sums(site) | {f"{site.name}.value": (site.heads, site.dense_rank, site.dense_rank)}

    def factor(self, evidence: Evidence) -> HeadBases:
        moment, _ = self._received(evidence)
        blocks = moment if moment.ndim == 3 else low_rank.head_blocks(moment, evidence.site.heads)
        return low_rank.value_output(blocks, wide(evidence.module.to_out[0].weight))

    def slim(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        basis = factor.left[..., :rank]
        return {**projected("to_v", evidence.module.to_v, basis), **self._output(evidence, basis)}

    def maps(self, evidence: Evidence, rank: int, factor: HeadBases) -> Maps:
        basis, left = factor.left[..., :rank], factor.left
        moment, mean = self._received(evidence)
        joint = moment if moment.ndim == 2 else torch.block_diag(*moment)
        kept, everything = torch.block_diag(*basis), torch.eye(len(joint), dtype=joint.dtype)
        solved = low_rank.solve_output(moment, everything, basis)  # of the identity: the map itself
        # What is kept gives itself back, unless moments are singular: then all of it is a mixture.
        whole = (project(basis, solved - kept).abs() > 1e-6).any()
        rest = left if whole else left[..., rank:]
        into = AxisMap(basis, rest, project(rest, solved - kept))
        if mean is not None:
            of_kept = kept.T @ mean
            into.mean = mean - solved @ of_kept
            into.ones = elimination.closest_to_one(kept.T @ joint @ kept, of_kept, torch.arange(len(of_kept)))
        return {"to_v": LayerMap(AxisMap(basis)), "to_out.0": LayerMap(None, into)}

    def emulate(self, evidence: Evidence, rank: int, factor: HeadBases) -> dict[str, Tensor]:
        basis = factor.left[..., :rank]
        weights = self._output(evidence, basis)
        return {**weights, "to_out.0.weight": weights["to_out.0.weight"] @ torch.block_diag(*basis).T}

    def _received(self, evidence: Evidence) -> tuple[Tensor, Tensor | None]:
        """Second moments of what the output projection receives: `[n, n]`, or `[H, d, d]` to solve head by head."""
        if evidence.forms.value_moments == "values":
            return evidence.moment("value"), None
        moment, mean = evidence.received(evidence.module.to_out[0])
        return (moment if evidence.forms.joint_output else low_rank.head_blocks(moment, evidence.site.heads)), mean

    def _output(self, evidence: Evidence, basis: Tensor) -> dict[str, Tensor]:
        """The output projection solved on a basis `[H, d, r]` of each head, and its bias if that changes."""
        output = evidence.module.to_out[0]
        moment, mean = self._received(evidence)
        weight = low_rank.solve_output(moment, wide(output.weight), basis)
        kept = torch.block_diag(*basis).T
        return solved("to_out.0", output, weight, mean, lambda mean: kept @ mean)


def _watch_mask(attention: Attention) -> tuple[Any, Callable[[Tensor], Tensor | None]]:
    """The handle of a hook, and a function from keys `[B, L, n]` to which of them the mask leaves: float `[B, L, 1]`.

    `attention_mask` is an additive bias `[B, 1, L]`, far below zero where nothing attends; without one, all do: None.
    """
    seen: list[Tensor | None] = [None]

    def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        bias = kwargs.get("attention_mask")
        states = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        keys: Tensor = (args[0] if args else kwargs["hidden_states"]) if states is None else states
        fits = isinstance(bias, Tensor) and bias.is_floating_point() and bias.numel() == keys[..., 0].numel()
        seen[0] = (bias > -1).float() if isinstance(bias, Tensor) and fits else None

    def attended_of(keys: Tensor) -> Tensor | None:
        return None if seen[0] is None else seen[0].to(keys.device).reshape(len(keys), -1, 1)

    return attention.register_forward_pre_hook(hook, with_kwargs=True), attended_of


def _mean(x: Tensor, attended: Tensor | None) -> Tensor:
    """Mean over the tokens of `[B, T, n]`, float32 `[B, 1, n]`."""
    if attended is None:
        return x.mean(dim=1, keepdim=True, dtype=torch.float32)
    return (x.float() * attended).sum(1, keepdim=True) / attended.sum(1, keepdim=True).clamp(min=1)

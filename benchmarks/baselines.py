"""What slimming is compared with, at the same sizes.

Magnitude, plain SVD, lot and Torch-Pruning choose without looking at activations, in the same structures.
`benchmarks.obs_diff` looks at them. The papers' recipe is forms and allocations of our own (`settings.PAPERS`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.errors import InputError, require
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Site
from slimdiff.plan import Plan
from slimdiff.slimming.slim import assemble


def magnitude_pruning(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Keep the head dimensions and channels whose weights are largest (L2 norms of both sides multiplied)."""
    return assemble(denoiser, plan, lambda module, site, rank: _pruned(module, site, rank, _magnitude(module, site)))


def random_channels(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Keep head dimensions and channels by lot (a fixed seed), nothing solved again: the least that can be done."""
    lot = torch.Generator().manual_seed(0)

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        return _pruned(module, site, rank, torch.rand(site.heads * site.dense_rank, generator=lot))

    return assemble(denoiser, plan, weights)


def plain_svd(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Truncated SVD of `W_q W_k^T` and `W_v W_o` per head, unwhitened; channels by magnitude."""

    def weights(module: Any, site: Site, rank: int) -> dict[str, Tensor]:
        if not GROUPS[site.group].per_head:
            return _pruned(module, site, rank, _magnitude(module, site))
        query, key, value, output = module.to_q, module.to_k, module.to_v, module.to_out[0]
        if any(linear.bias is not None for linear in (query, key, value)):
            raise InputError(f"{site.path} has biases, which the plain SVD of a product leaves out")
        shape = (site.heads, site.dense_rank, -1)
        if site.group == "query_key":
            left, right = query.weight.reshape(shape), key.weight.reshape(shape)
            scale = (rank / site.dense_rank) ** 0.5
            first, second = _truncate(left.mT @ right, rank)
            return {"to_q.weight": (first * scale).mT.flatten(0, 1), "to_k.weight": second.flatten(0, 1)}
        left, right = value.weight.reshape(shape), output.weight.T.reshape(shape)
        first, second = _truncate(left.mT @ right, rank)
        return {"to_v.weight": first.mT.flatten(0, 1), "to_out.0.weight": second.flatten(0, 1).T}

    return assemble(denoiser, plan, weights)


def torch_pruning(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Torch-Pruning's choice: its dependency graph groups what must go together, its group magnitude (L2) ranks that.

    In attention it ties all four projections, so queries, keys and values keep the same dimensions of a head.
    """
    scores: dict[str, Tensor] = {}

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.path not in scores:
            scores[site.path] = _group_magnitude(module, site)
        return _pruned(module, site, rank, scores[site.path])

    return assemble(denoiser, plan, weights)


def _pruned(module: nn.Module, site: Site, rank: int, score: Tensor) -> dict[str, Tensor]:
    """The dense weights of each head's largest entries of a score `[H d]`, or each norm group's, equally many."""
    parts = score.reshape(site.heads, site.multiple, -1)
    best = parts.topk(rank // site.multiple).indices.sort().values
    kept = (best + torch.arange(site.multiple)[:, None] * parts.shape[-1]).flatten(1)
    weights = GROUPS[site.group].cut(module, site, kept)
    if site.group == "query_key":  # the stock processor will divide by sqrt(rank)
        scale = (rank / site.dense_rank) ** 0.5
        weights |= {name: weight * scale for name, weight in weights.items() if name.startswith("to_q.")}
    return weights


def _magnitude(module: nn.Module, site: Site) -> Tensor:
    """Per inner dimension, the L2 norms of its rows, gate rows and columns multiplied, `[H d]`."""
    score = torch.ones(site.heads * site.dense_rank)
    for _, layer, inner in GROUPS[site.group].layers(module):
        if inner.checked:
            norms = layer.weight.transpose(0, inner.axis).flatten(1).norm(dim=1)[inner.before :]
            score = score * norms.reshape(-1, len(score)).prod(0)
    return score


def _group_magnitude(module: Any, site: Site) -> Tensor:
    """Torch-Pruning's importance of every inner dimension of a module, `[H d]`."""
    tp = require("torch_pruning", "dev")
    prune = tp.prune_linear_in_channels
    if site.group == "resnet":
        last, prune = module.conv2, tp.prune_conv_in_channels
        time = None if module.time_emb_proj is None else torch.randn(1, module.time_emb_proj.in_features)
        inputs: tuple = (torch.randn(1, module.conv1.in_channels, 8, 8), time)
    elif site.group == "feed_forward":
        last = module.net[2]
        inputs = (torch.randn(1, 4, module.net[0].proj.in_features),)
    else:
        last = module.to_out[0]
        inputs = (torch.randn(1, 4, module.to_q.in_features), torch.randn(1, 4, module.to_k.in_features))
    with torch.enable_grad():  # the graph is read off autograd's
        trainable = copy.deepcopy(module).requires_grad_(True)
        last = trainable.get_submodule(next(name for name, m in module.named_modules() if m is last))
        graph = tp.DependencyGraph().build_dependency(trainable, example_inputs=inputs)
        group = graph.get_pruning_group(last, prune, idxs=list(range(site.heads * site.dense_rank)))
        return tp.importance.GroupMagnitudeImportance(p=2)(group).detach()


def _truncate(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r factors `[H, in, r]`, `[H, r, out]` of a product `[H, in, out]`."""
    u, s, vt = torch.linalg.svd(product.double(), full_matrices=False)
    half = s[:, :rank].sqrt()
    return u[..., :rank] * half[:, None, :], half[:, :, None] * vt[:, :rank]

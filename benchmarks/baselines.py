"""What slimming is compared with: the same structures at the same sizes, chosen without looking at activations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from slimdiff.errors import InputError, require
from slimdiff.groups.resnet import sliced
from slimdiff.groups.sites import Site, attention_linears, feed_forward_linears, resnet_layers
from slimdiff.plan import Plan
from slimdiff.slimming.slim import assemble


def magnitude_pruning(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Keep the head dimensions and channels whose weights are largest (L2 norms of both sides multiplied)."""

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.group == "feed_forward":
            return _largest_channels(module, site, rank)
        if site.group == "resnet":
            return _largest_inner_channels(module, site, rank)
        query, key, value, output = attention_linears(module)
        if site.group == "query_key":
            kept = _top(query.weight.norm(dim=1) * key.weight.norm(dim=1), site, rank)
            return _queries_keys(query, key, kept, site, rank)
        kept = _top(value.weight.norm(dim=1) * output.weight.norm(dim=0), site, rank)
        return _values_output(value, output, kept)

    return assemble(denoiser, plan, weights)


def random_channels(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Keep head dimensions and channels by lot (a fixed seed), nothing solved again: the least that can be done."""
    lot = torch.Generator().manual_seed(0)

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.group == "feed_forward":
            up, down, gated = feed_forward_linears(module)
            return _channels(up, down, gated, _top(torch.rand(site.dense_rank, generator=lot), site, rank))
        query, key, value, output = attention_linears(module)
        kept = _top(torch.rand(site.heads * site.dense_rank, generator=lot), site, rank)
        if site.group == "query_key":
            return _queries_keys(query, key, kept, site, rank)
        return _values_output(value, output, kept)

    return assemble(denoiser, plan, weights)


def plain_svd(denoiser: nn.Module, plan: Plan) -> nn.Module:
    """Truncated SVD of `W_q W_k^T` and `W_v W_o` per head, unwhitened; channels by magnitude."""

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.group == "feed_forward":
            return _largest_channels(module, site, rank)
        if site.group == "resnet":
            return _largest_inner_channels(module, site, rank)
        query, key, value, output = attention_linears(module)
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
        score = scores[site.path]
        if site.group == "resnet":
            return sliced(module, _equally_many(score, site, rank))
        kept = _top(score, site, rank)
        if site.group == "feed_forward":
            return _channels(*feed_forward_linears(module), kept)
        query, key, value, output = attention_linears(module)
        if site.group == "query_key":
            return _queries_keys(query, key, kept, site, rank)
        return _values_output(value, output, kept)

    return assemble(denoiser, plan, weights)


def _group_magnitude(module: nn.Module, site: Site) -> Tensor:
    """Torch-Pruning's importance of every inner dimension of a module, `[H d]`."""
    tp = require("torch_pruning", "dev")
    last: nn.Module
    if site.group == "resnet":
        layers = resnet_layers(module)
        time = None if layers.time is None else torch.randn(1, layers.time.in_features)
        inputs: tuple = (torch.randn(1, layers.first.in_channels, 8, 8), time)
        last, prune = layers.second, tp.prune_conv_in_channels
    elif site.group == "feed_forward":
        up, last, _ = feed_forward_linears(module)
        inputs, prune = (torch.randn(1, 4, up.in_features),), tp.prune_linear_in_channels
    else:
        query, key, _, last = attention_linears(module)
        inputs = (torch.randn(1, 4, query.in_features), torch.randn(1, 4, key.in_features))
        prune = tp.prune_linear_in_channels
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


def _top(score: Tensor, site: Site, rank: int) -> Tensor:
    """Indices of each head's `rank` largest entries of a score `[H d]`, in order."""
    best = score.reshape(site.heads, site.dense_rank).topk(rank, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(site.heads)[:, None] * site.dense_rank).flatten()


def _largest_channels(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
    up, down, gated = feed_forward_linears(module)
    rows = up.weight.norm(dim=1)
    value = rows[: site.dense_rank]
    score = value * rows[site.dense_rank :] * down.weight.norm(dim=0) if gated else value * down.weight.norm(dim=0)
    return _channels(up, down, gated, _top(score, site, rank))


def _queries_keys(query: nn.Linear, key: nn.Linear, kept: Tensor, site: Site, rank: int) -> dict[str, Tensor]:
    scale = (rank / site.dense_rank) ** 0.5  # the stock processor will divide by sqrt(rank)
    return {
        **{f"to_q.{n}": p[kept] * scale for n, p in query.named_parameters()},
        **{f"to_k.{n}": p[kept] for n, p in key.named_parameters()},
    }


def _values_output(value: nn.Linear, output: nn.Linear, kept: Tensor) -> dict[str, Tensor]:
    return {
        **{f"to_v.{n}": p[kept] for n, p in value.named_parameters()},
        "to_out.0.weight": output.weight[:, kept],
    }


def _channels(up: nn.Linear, down: nn.Linear, gated: bool, kept: Tensor) -> dict[str, Tensor]:
    both = torch.cat([kept, kept + down.in_features]) if gated else kept
    result = {f"net.0.proj.{n}": p[both] for n, p in up.named_parameters()}
    return {**result, "net.2.weight": down.weight[:, kept]}


def _largest_inner_channels(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
    layers = resnet_layers(module)
    score = layers.first.weight.flatten(1).norm(dim=1) * layers.second.weight.transpose(0, 1).flatten(1).norm(dim=1)
    return sliced(module, _equally_many(score, site, rank))


def _equally_many(score: Tensor, site: Site, rank: int) -> Tensor:
    """Indices of the largest entries of a score `[C]`, equally many out of every group of the norm, in order."""
    size = site.dense_rank // site.multiple
    best = score.reshape(site.multiple, size).topk(rank // site.multiple, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(site.multiple)[:, None] * size).flatten()

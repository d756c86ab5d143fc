"""OBS-Diff's structured mode: whole heads and feed-forward channels go by the optimal brain surgeon (arXiv 2510.06751).

Facts are the paper's and its public code's (github.com/Alrightlone/OBS-Diff, Apache-2.0), the code is new. Each last
linear's Hessian is E[x x^T] of what it receives over the denoising trajectories, where the steps weigh from 1.2 (the
first, in noise) down to 0.8, falling as a logarithm does, and 1 % of its mean diagonal is added to its diagonal. What
costs the output least goes, and what stays is updated. Layers are cut in four packages: each sees trajectories of the
model that the packages before it have cut. Every layer loses the same share.

At its full strength here: one channel at a time instead of up to 64, a head's exact cost instead of a sum over its
columns, and, because a share of two or three heads is no whole number, three ways to round it: no head, rounded down,
to the nearest; feed-forwards make up the size, and the way that errs least on held calls is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from slimdiff.denoising.trajectory import Call, denoiser_name, predict, sample_batch, with_denoiser
from slimdiff.errors import InputError
from slimdiff.fidelity import noise_error
from slimdiff.groups import GROUPS
from slimdiff.plan import Plan, SitePlan
from slimdiff.settings import Sampling

DAMPING = 0.01
FIRST_WEIGHT, LAST_WEIGHT = 1.2, 0.8
PACKAGES = 4
HEADS: tuple[Callable[[float], int], ...] = (lambda share: 0, math.floor, lambda share: math.floor(share + 0.5))
"""Ways to make whole heads of a share of them."""
LAST = {"value_output": "to_out.0", "feed_forward": "net.2"}


@torch.no_grad()
def obs_diff(
    pipeline: DiffusionPipeline, plan: Plan, prompts: Sequence[Any], sampling: Sampling, held: Sequence[Call]
) -> nn.Module:
    """The denoiser cut to a plan's size. Of the plan nothing else is used.

    Args:
        prompts: whose trajectories make the Hessians; held: calls that choose how heads are rounded.

    Raises:
        InputError: if attention and feed-forwards alone cannot give so much.
    """
    dense = getattr(pipeline, denoiser_name(pipeline))
    models = []
    for counts in {tuple(amounts(plan, way).items()): None for way in HEADS}:
        if all(count < _units(plan.sites[name]) for name, count in counts):
            models.append(_cut(pipeline, plan, dict(counts), prompts, sampling))
    if not models:
        raise InputError(f"heads and channels of feed-forwards are less than the {plan.parameters} of the plan")
    errors = [noise_error(partial(predict, dense), partial(predict, m), held)["relative_mse"] for m in models]
    return models[errors.index(min(errors))]


def _units(site: SitePlan) -> int:
    return site.heads if site.group == "value_output" else site.dense_rank


def amounts(plan: Plan, whole_heads: Callable[[float], int]) -> dict[str, int]:
    """By name of a `value_output` or `feed_forward` site, how many heads or channels go, for the plan's size."""
    removed = plan.parameters["dense"] - plan.parameters["slim"]
    sites = {name: site for name, site in plan.sites.items() if site.group != "resnet"}
    share = removed / sum(site.cost * site.dense_rank for site in sites.values())
    counts = {n: whole_heads(share * s.heads) for n, s in sites.items() if s.group == "value_output"}
    # A head of its layer: a query's and key's dimensions go with the value's.
    gone = sum(
        counts.get(f"{s.path}.value_output", 0) / s.heads * s.cost * s.dense_rank
        for s in sites.values()
        if s.group != "feed_forward"
    )
    channels = {name: site for name, site in sites.items() if site.group == "feed_forward"}
    rest = (removed - gone) / sum(site.cost * site.dense_rank for site in channels.values())
    return counts | {name: max(0, math.ceil(rest * site.dense_rank)) for name, site in channels.items()}


def step_weights(steps: int) -> list[float]:
    """What a trajectory's steps weigh, from the first on."""
    slope = (FIRST_WEIGHT - LAST_WEIGHT) / math.log(max(steps, 2))
    return [LAST_WEIGHT + slope * math.log(steps - step) for step in range(steps)]


def _cut(
    pipeline: DiffusionPipeline, plan: Plan, counts: dict[str, int], prompts: Sequence[Any], sampling: Sampling
) -> nn.Module:
    model = copy.deepcopy(getattr(pipeline, denoiser_name(pipeline)))
    names = sorted((name for name, count in counts.items() if count), key=lambda name: _place(plan.sites[name].path))
    size = -(-len(names) // PACKAGES)
    for first in range(0, len(names), size):
        package = [plan.sites[name] for name in names[first : first + size]]
        hessians = _hessians(with_denoiser(pipeline, model), package, prompts, sampling)
        for name, site in zip(names[first : first + size], package, strict=True):
            _shrink(model.get_submodule(site.path), site, counts[name], hessians[site.path])
    return model


def _place(path: str) -> int:
    """Of a path in the order in which a UNet runs, which is not the order of its modules; 0 in other denoisers."""
    return {"mid_block": 1, "up_blocks": 2}.get(path.split(".")[0], 0)


def _hessians(
    pipeline: DiffusionPipeline, sites: Sequence[SitePlan], prompts: Sequence[Any], sampling: Sampling
) -> dict[str, Tensor]:
    """E[x x^T] of what the last linears receive, by path of the module, float64 `[n, n]` on the CPU."""
    model = getattr(pipeline, denoiser_name(pipeline))
    weights, steps = step_weights(sampling.steps), [-1]
    sums: dict[str, Tensor] = {}

    def count(*_: Any) -> None:
        steps[0] += 1

    def see(path: str, _layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        weighed = weights[steps[0] % sampling.steps] * (x.T @ x)
        sums[path] = sums[path] + weighed if path in sums else weighed

    with ExitStack() as stack:
        stack.enter_context(model.register_forward_pre_hook(count))
        for site in sites:
            layer = model.get_submodule(f"{site.path}.{LAST[site.group]}")
            stack.enter_context(layer.register_forward_pre_hook(partial(see, site.path)))
        for start in range(0, len(prompts), sampling.batch):
            steps[0] = -1
            sample_batch(pipeline, prompts, range(len(prompts))[start : start + sampling.batch], sampling)
    return {path: total.double().cpu() for path, total in sums.items()}


def eliminate(hessian: Tensor, weight: Tensor, count: int, block: int) -> tuple[Tensor, Tensor]:
    """Remove blocks of neighbouring inputs, the cheapest first, and update the others' weights.

    A block B costs `tr(W_B (H^-1_BB)^-1 W_B^T)`, and leaving it out moves W by `-W_B (H^-1_BB)^-1 H^-1_B:`.

    Args:
        hessian: `[n, n]`, float64; weight: `[out, n]`; count: of blocks that go; block: inputs of each.

    Returns:
        the inputs that stay, rising, and the updated weight of all of them `[out, n]`, zero where they are gone.
    """
    hessian, weight = hessian.clone(), weight.double().cpu().clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(DAMPING * mean if mean > 0 else torch.ones(()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    left = torch.ones(len(hessian) // block, dtype=torch.bool)
    for _ in range(count):
        square = inverse.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [n / block, block, n / block, block]
        blocks = square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        blocks[~left] = torch.eye(block, dtype=torch.float64)
        rows = weight.T.unflatten(0, (-1, block))  # [n / block, block, out]
        cost = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))
        cost[~left] = torch.inf
        least = int(cost.argmin())
        gone = slice(least * block, (least + 1) * block)
        move = torch.linalg.solve(inverse[gone, gone], inverse[gone])
        weight -= weight[:, gone] @ move
        inverse -= inverse[:, gone] @ move
        left[least] = False
        weight[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
    return left.repeat_interleave(block).nonzero()[:, 0], weight


def _shrink(module: Any, site: SitePlan, count: int, hessian: Tensor) -> None:
    """Cut a module in place."""
    last = module.get_submodule(LAST[site.group])
    block = site.dense_rank if site.group == "value_output" else 1
    kept, weight = eliminate(hessian, last.weight, count, block)
    for path, inner in GROUPS[site.group].inner.items() if block == 1 else ATTENTION:
        layer = module.get_submodule(path)
        if inner.axis == 1:
            small = weight[:, kept]
        else:
            parts = torch.arange(len(layer.weight) // (site.heads * site.dense_rank))[:, None]
            rows = (kept + parts * site.heads * site.dense_rank).flatten().to(layer.weight.device)
            small = layer.weight[rows]
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[rows], requires_grad=False)
        layer.weight = nn.Parameter(small.to(layer.weight).contiguous(), requires_grad=False)
        layer.out_features, layer.in_features = layer.weight.shape
    if block > 1:
        module.heads -= count
        module.inner_dim = module.inner_kv_dim = module.heads * site.dense_rank


ATTENTION = [*GROUPS["query_key"].inner.items(), *GROUPS["value_output"].inner.items()]
"""The layers of which a head takes its rows or columns along."""

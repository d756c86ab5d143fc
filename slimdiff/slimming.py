"""From a dense denoiser, its statistics and a plan to the slim denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff import closed_forms, resnets
from slimdiff.calibration import Statistics, weights_hash
from slimdiff.closed_forms import HeadBases
from slimdiff.errors import InputError
from slimdiff.models import slim_class_of
from slimdiff.plan import Plan
from slimdiff.resnets import ResnetSettings
from slimdiff.sites import Site, attention_linears, feed_forward_linears, find_sites, resnet_layers
from slimdiff.trajectory import Call


@dataclass
class ChannelOrder:
    """Feed-forward or resnet channels, best first, and the relative error with the first r of them kept (`[n + 1]`)."""

    order: Tensor
    tail: Tensor


Factors = dict[str, "HeadBases | ChannelOrder"]


def factorise(
    denoiser: nn.Module, statistics: Statistics, sites: Sequence[Site], progress: str | None = None
) -> Factors:
    """Each site's basis or order: everything that does not depend on the rank, by site name."""
    modules = dict(denoiser.named_modules())
    factors: Factors = {}
    for site in tqdm(sites, desc=progress, disable=progress is None, unit="site"):
        module = modules[site.path]
        if site.group == "query_key":
            factors[site.name] = closed_forms.query_key(
                statistics.mean(f"{site.name}.query"), statistics.mean(f"{site.name}.key")
            )
        elif site.group == "value_output":
            output = attention_linears(module)[3].weight.detach().double().cpu()
            factors[site.name] = closed_forms.value_output(statistics.mean(site.name), output, site.heads)
        elif site.group == "resnet":
            second = resnet_layers(module).second.weight.detach().double().cpu()
            factors[site.name] = ChannelOrder(*resnets.channel_order(statistics.mean(site.name), second, site.multiple))
        else:
            down = feed_forward_linears(module)[1].weight.detach().double().cpu()
            # Exact elimination is cubic with a large constant; beyond 1024 steps a site would take minutes.
            block = max(1, site.dense_rank // 1024)
            factors[site.name] = ChannelOrder(*closed_forms.feed_forward_order(statistics.mean(site.name), down, block))
    return factors


def check_statistics(denoiser: nn.Module, statistics: Statistics) -> None:
    """Raises:
    InputError: if the statistics were taken on other weights.
    """
    if statistics.model_hash != weights_hash(denoiser):
        raise InputError("these statistics were taken on another model (its weights differ): calibrate this one")


@torch.no_grad()
def slim_denoiser(
    denoiser: nn.Module,
    statistics: Statistics,
    plan: Plan,
    factors: Factors | None = None,
    progress: str | None = "slim",
    *,
    resnet_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
) -> nn.Module:
    """Build the slim model of a plan. Weights that do not change are shared with the dense model, not copied.

    A site at its dense rank keeps its weights untouched.

    Args:
        factors: from `factorise`, if they are there already.
        resnet_calls: recorded denoiser calls that slim resnets are fitted on, needed if the plan has any.

    Raises:
        InputError: if statistics or plan are another model's, or there is no call to fit resnets on.
    """
    check_statistics(denoiser, statistics)
    if plan.model_hash != statistics.model_hash:
        raise InputError("this plan was made for another model (its weights differ): plan again")
    changed = _changed(denoiser, plan)
    known = factors or factorise(denoiser, statistics, changed, progress)
    fitted = fit_resnets(
        denoiser, known, {s: plan.sites[s.name].rank for s in changed}, resnet_calls, resnet_settings, progress
    )

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.name in fitted:
            return fitted[site.name]
        return slim_weights(module, site, rank, known[site.name], statistics)

    return assemble(denoiser, plan, weights)


def fit_resnets(
    denoiser: nn.Module,
    factors: Factors,
    ranks: Mapping[Site, int],
    calls: Sequence[Call],
    settings: ResnetSettings | None = None,
    progress: str | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Weights of those sites that are resnets, at these ranks (see `resnets.refit`), by site name."""
    kept = {}
    for site, rank in ranks.items():
        factor = factors[site.name]
        if site.group == "resnet" and isinstance(factor, ChannelOrder):
            kept[site] = factor.order[:rank]
    return resnets.refit(denoiser, kept, calls, settings, progress) if kept else {}


def _changed(denoiser: nn.Module, plan: Plan) -> list[Site]:
    """The plan's sites that lose something, in the model's order."""
    return [s for s in find_sites(denoiser)[0] if s.name in plan.sites and plan.sites[s.name].rank < s.dense_rank]


def assemble(
    denoiser: nn.Module, plan: Plan, weights: Callable[[nn.Module, Site, int], dict[str, Tensor]]
) -> nn.Module:
    """The slim model of a plan, with the smaller weights that `weights(module, site, rank)` gives by parameter name."""
    slim_class = slim_class_of(denoiser)
    plan = plan.recount()
    # A checkpoint's config may have keys that its class does not know: diffusers keeps them, constructors refuse them.
    keys = inspect.signature(slim_class.__init__).parameters
    config = {k: v for k, v in denoiser.config.items() if k in keys}  # type: ignore[union-attr,operator]
    with torch.device("meta"):
        slim = slim_class(slim_plan=plan.model_dump(mode="json"), **config)  # refuses a plan of another architecture
    state = dict(denoiser.state_dict())
    modules = dict(denoiser.named_modules())
    for site in _changed(denoiser, plan):
        for name, tensor in weights(modules[site.path], site, plan.sites[site.name].rank).items():
            key = f"{site.path}.{name}"
            state[key] = tensor.to(state[key])
    slim.load_state_dict(state, strict=True, assign=True)
    persistent = set(state)
    for name, buffer in denoiser.named_buffers():
        if name not in persistent:
            owner, _, leaf = name.rpartition(".")
            slim.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return slim.train(denoiser.training).requires_grad_(False)


def slim_weights(
    module: nn.Module, site: Site, rank: int, factor: HeadBases | ChannelOrder, statistics: Statistics
) -> dict[str, Tensor]:
    """The site's smaller weights and biases by parameter name, float64."""
    if isinstance(factor, ChannelOrder):
        up, down, gated = feed_forward_linears(module)
        kept = factor.order[:rank].sort().values
        rows = torch.cat([kept, kept + site.dense_rank]) if gated else kept
        weights = {
            "net.0.proj.weight": _wide(up.weight)[rows],
            "net.2.weight": closed_forms.solve_down(statistics.mean(site.name), _wide(down.weight), kept),
        }
        if up.bias is not None:
            weights["net.0.proj.bias"] = _wide(up.bias)[rows]
        return weights
    query, key, value, output = attention_linears(module)
    left, right = factor.left[..., :rank], factor.right[..., :rank]
    if site.group == "query_key":
        # The stock processor will divide by sqrt(rank): fold in what makes that the dense scale.
        scale = (rank / site.dense_rank) ** 0.5
        return {**_project("to_q", query, left * scale), **_project("to_k", key, right)}
    solved = closed_forms.solve_output(statistics.mean(site.name), _wide(output.weight), left)
    return {**_project("to_v", value, left), "to_out.0.weight": solved}


@torch.no_grad()
def emulated_weight(
    module: nn.Module, site: Site, rank: int, factor: HeadBases | ChannelOrder, statistics: Statistics
) -> tuple[str, Tensor, Tensor | None]:
    """One site slimmed alone, in the dense shapes: the layer to change, its weight, and its bias if that changes.

    Computes what the slim weights would, so that one site's effect can be measured without touching its neighbours.
    """
    if isinstance(factor, ChannelOrder):
        _, down, _ = feed_forward_linears(module)
        kept = factor.order[:rank]
        weight = torch.zeros_like(_wide(down.weight))
        weight[:, kept] = closed_forms.solve_down(statistics.mean(site.name), _wide(down.weight), kept)
        return "net.2", weight, None
    query, _, _, output = attention_linears(module)
    left, right = factor.left[..., :rank], factor.right[..., :rank]
    if site.group == "query_key":  # q L (k R)^T = (q L R^T) k^T
        projected = _project("to_q", query, left @ right.mT)
        return "to_q", projected["to_q.weight"], projected.get("to_q.bias")
    solved = closed_forms.solve_output(statistics.mean(site.name), _wide(output.weight), left)
    return "to_out.0", solved @ torch.block_diag(*left).T, None


def _project(name: str, linear: nn.Linear, basis: Tensor) -> dict[str, Tensor]:
    """A projection whose head outputs x become x B: basis `[H, d, r]`."""
    heads, d, _ = basis.shape
    weight = _wide(linear.weight).reshape(heads, d, -1)
    result = {f"{name}.weight": (basis.mT @ weight).flatten(0, 1)}
    if linear.bias is not None:
        bias = _wide(linear.bias).reshape(heads, d, 1)
        result[f"{name}.bias"] = (basis.mT @ bias).flatten()
    return result


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()

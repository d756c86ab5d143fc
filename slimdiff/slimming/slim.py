"""From a dense denoiser, its statistics and a plan to the slim denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slimdiff.algebra import closed_forms
from slimdiff.algebra.closed_forms import HeadBases
from slimdiff.calibration.calibrate import weights_hash
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import resnet
from slimdiff.groups.sites import Site, attention_linears, feed_forward_linears, find_sites, resnet_layers
from slimdiff.models import fitting_sites, slim_class_of
from slimdiff.plan import Plan
from slimdiff.settings import Forms, ResnetSettings
from slimdiff.slimming.compensation import DenseOutputs, compensate, stages
from slimdiff.statistics import Statistics


@dataclass
class ChannelOrder:
    """Feed-forward or resnet channels, best first, and the relative error with the first r of them kept (`[n + 1]`)."""

    order: Tensor
    tail: Tensor


Factors = dict[str, "HeadBases | ChannelOrder"]


def factorise(
    denoiser: nn.Module,
    statistics: Statistics,
    sites: Sequence[Site],
    progress: str | None = None,
    forms: Forms | None = None,
) -> Factors:
    """Each site's basis or order: everything that does not depend on the rank, by site name.

    Sites that never ran in calibration have none.
    """
    forms = forms or Forms()
    modules = dict(denoiser.named_modules())
    factors: Factors = {}
    for site in tqdm(sites, desc=progress, disable=progress is None, unit="site"):
        if not statistics.covers(site.name, site.group):
            continue
        module = modules[site.path]
        if site.group == "query_key":
            key = statistics.mean(f"{site.name}.key")
            if not forms.centre_keys:
                key = key + statistics.mean(f"{site.name}.key_mean")
            factors[site.name] = closed_forms.query_key(statistics.mean(f"{site.name}.query"), key)
        elif site.group == "value_output":
            output = attention_linears(module)[3]
            moment, _ = _received(statistics, site, output, forms)
            blocks = moment if moment.ndim == 3 else closed_forms.head_blocks(moment, site.heads)
            factors[site.name] = closed_forms.value_output(blocks, _wide(output.weight))
        elif site.group == "resnet":
            second = _wide(resnet_layers(module).second.weight)
            factors[site.name] = ChannelOrder(*resnet.channel_order(statistics.mean(site.name), second, site.multiple))
        else:
            down = feed_forward_linears(module)[1]
            moment, _ = _received(statistics, site, down, forms)
            if site.dense_rank > closed_forms.EXACT_CHANNELS:
                moment = moment.float()  # as it was summed: an order needs no more, and half the memory
            leverage = forms.channels == "ridge_leverage"
            choose = closed_forms.ridge_leverage_order if leverage else closed_forms.feed_forward_order
            factors[site.name] = ChannelOrder(*choose(moment, _wide(down.weight)))
    return factors


def _received(statistics: Statistics, site: Site, last: nn.Linear, forms: Forms) -> tuple[Tensor, Tensor | None]:
    """Second moments of what a site's last linear receives; with its mean, they are about it.

    Returns:
        `[n, n]`, or `[H, d, d]` where heads are solved one by one; and `[n]`, or None where no constant is carried.
    """
    if site.group == "value_output" and forms.value_moments == "values":
        return statistics.mean(f"{site.name}.value"), None
    moment, first = statistics.mean(site.name), None
    if forms.constant and last.bias is not None:
        first = statistics.first(site.name)
        moment.addr_(first, first, alpha=-1)
    if site.group == "value_output" and not forms.joint_output:
        moment = closed_forms.head_blocks(moment, site.heads)
    return moment, first


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
    fitting_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
    dense_outputs: DenseOutputs | None = None,
    release_dense: bool = False,
) -> nn.Module:
    """Build the slim model of a plan. Weights that do not change are shared with the dense model, not copied.

    A site at its dense rank keeps its weights untouched.

    Args:
        factors: from `factorise`, if they are there already.
        fitting_calls: recorded denoiser calls that slim resnets are fitted on and errors compensated, needed if the
            plan has any.
        dense_outputs: on the same calls, if there is more than one slim model to make.
        release_dense: let go of each dense weight when its slim one is made, so that both models never are in memory
            together. The dense model cannot be used afterwards, nor if this fails halfway.

    Raises:
        InputError: if statistics or plan are another model's, the plan slims a site that never ran in calibration, or
            there is no call to fit on.
    """
    check_statistics(denoiser, statistics)
    if plan.model_hash != statistics.model_hash:
        raise InputError("this plan was made for another model (its weights differ): plan again")
    fitting_sites(denoiser, plan)  # refuse before the long work, not after
    changed = _changed(denoiser, plan)
    told = None if progress is None else f"{progress}: factorise"
    known = factors or factorise(denoiser, statistics, changed, told, plan.forms)
    for site in changed:
        if site.name not in known:
            raise InputError(f"the plan slims {site.name}, which never ran in calibration: leave it at its dense rank")
    fitted = fit_resnets(
        denoiser, known, {s: plan.sites[s.name].rank for s in changed}, fitting_calls, resnet_settings, progress
    )

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        if site.name in fitted:
            return fitted[site.name]
        return slim_weights(module, site, rank, known[site.name], statistics, plan.forms)

    mended = stages(denoiser, plan, plan.forms.compensate, fitting_calls)
    if not mended:
        return assemble(denoiser, plan, weights, progress, release_dense=release_dense)
    told = progress and f"{progress}: compensate"
    outputs = (dense_outputs or DenseOutputs(denoiser, fitting_calls)).rows(mended, told and f"{told}, dense")
    slim = assemble(denoiser, plan, weights, progress, release_dense=release_dense)
    compensate(slim, mended, outputs, fitting_calls, told)
    if release_dense:
        for name in {name for stage in mended for name in stage}:
            for parameter in denoiser.get_submodule(name).parameters():
                parameter.data = parameter.data.new_empty(0)
    return slim


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
    return resnet.refit(denoiser, kept, calls, settings, progress) if kept else {}


def _changed(denoiser: nn.Module, plan: Plan) -> list[Site]:
    """The plan's sites that lose something, in the model's order."""
    return [s for s in find_sites(denoiser)[0] if s.name in plan.sites and plan.sites[s.name].rank < s.dense_rank]


def assemble(
    denoiser: nn.Module,
    plan: Plan,
    weights: Callable[[nn.Module, Site, int], dict[str, Tensor]],
    progress: str | None = None,
    *,
    release_dense: bool = False,
) -> nn.Module:
    """The slim model of a plan, with the smaller weights that `weights(module, site, rank)` gives by parameter name.

    `release_dense` is `slim_denoiser`'s.
    """
    slim_class = slim_class_of(denoiser)
    plan = plan.recount()
    # A checkpoint's config may have keys that its class does not know: diffusers keeps them, constructors refuse them.
    keys = inspect.signature(slim_class.__init__).parameters
    config = {k: v for k, v in denoiser.config.items() if k in keys}  # type: ignore[union-attr,operator]
    with torch.device("meta"):
        slim = slim_class(slim_plan=plan.model_dump(mode="json"), **config)  # refuses a plan of another architecture
    state = dict(denoiser.state_dict())
    modules = dict(denoiser.named_modules())
    for site in tqdm(_changed(denoiser, plan), desc=progress, disable=progress is None, unit="site"):
        for name, tensor in weights(modules[site.path], site, plan.sites[site.name].rank).items():
            key = f"{site.path}.{name}"
            state[key] = tensor.to(state[key])
            if release_dense:
                dense = denoiser.get_parameter(key)
                dense.data = dense.data.new_empty(0)
    slim.load_state_dict(state, strict=True, assign=True)
    persistent = set(state)
    for name, buffer in denoiser.named_buffers():
        if name not in persistent:
            owner, _, leaf = name.rpartition(".")
            slim.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return slim.train(denoiser.training).requires_grad_(False)


def slim_weights(
    module: nn.Module,
    site: Site,
    rank: int,
    factor: HeadBases | ChannelOrder,
    statistics: Statistics,
    forms: Forms | None = None,
) -> dict[str, Tensor]:
    """The site's smaller weights and biases by parameter name, float64."""
    forms = forms or Forms()
    if isinstance(factor, ChannelOrder):
        up, _, gated = feed_forward_linears(module)
        kept = factor.order[:rank].sort().values
        rows = torch.cat([kept, kept + site.dense_rank]) if gated else kept
        weights = {"net.0.proj.weight": _wide(up.weight)[rows]}
        if up.bias is not None:
            weights["net.0.proj.bias"] = _wide(up.bias)[rows]
        return {**weights, **_down(module, site, kept, statistics, forms)}
    query, key, value, _ = attention_linears(module)
    left, right = factor.left[..., :rank], factor.right[..., :rank]
    if site.group == "query_key":
        # The stock processor will divide by sqrt(rank): fold in what makes that the dense scale.
        scale = (rank / site.dense_rank) ** 0.5
        return {**_project("to_q", query, left * scale), **_project("to_k", key, right)}
    return {**_project("to_v", value, left), **_out(module, site, left, statistics, forms)}


@torch.no_grad()
def emulated_weights(
    module: nn.Module,
    site: Site,
    rank: int,
    factor: HeadBases | ChannelOrder,
    statistics: Statistics,
    forms: Forms | None = None,
) -> dict[str, Tensor]:
    """One site slimmed alone, in the dense shapes: the weights and biases that change, by parameter name.

    Computes what the slim weights would, so that one site's effect can be measured without touching its neighbours.
    """
    forms = forms or Forms()
    if isinstance(factor, ChannelOrder):
        kept = factor.order[:rank]
        solved = _down(module, site, kept, statistics, forms)
        weight = torch.zeros(feed_forward_linears(module)[1].weight.shape, dtype=torch.float64)
        weight[:, kept] = solved["net.2.weight"]
        return {**solved, "net.2.weight": weight}
    left, right = factor.left[..., :rank], factor.right[..., :rank]
    if site.group == "query_key":  # q L (k R)^T = (q L R^T) k^T
        return _project("to_q", attention_linears(module)[0], left @ right.mT)
    solved = _out(module, site, left, statistics, forms)
    return {**solved, "to_out.0.weight": solved["to_out.0.weight"] @ torch.block_diag(*left).T}


def _down(module: nn.Module, site: Site, kept: Tensor, statistics: Statistics, forms: Forms) -> dict[str, Tensor]:
    """The down projection solved on the kept channels, and its bias if that changes."""
    down = feed_forward_linears(module)[1]
    moment, first = _received(statistics, site, down, forms)
    weight = closed_forms.solve_down(moment, _wide(down.weight), kept)
    return {"net.2.weight": weight, **_bias("net.2", down, weight, first, lambda mean: mean[kept])}


def _out(module: nn.Module, site: Site, basis: Tensor, statistics: Statistics, forms: Forms) -> dict[str, Tensor]:
    """The output projection solved on a basis `[H, d, r]` of each head, and its bias if that changes."""
    output = attention_linears(module)[3]
    moment, first = _received(statistics, site, output, forms)
    weight = closed_forms.solve_output(moment, _wide(output.weight), basis)
    kept = torch.block_diag(*basis).T
    return {"to_out.0.weight": weight, **_bias("to_out.0", output, weight, first, lambda mean: kept @ mean)}


def _bias(
    name: str, last: nn.Linear, weight: Tensor, first: Tensor | None, keep: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """A last linear's bias with the mean of what goes, where a constant is carried: `b + W E[x] - W' E[x']`."""
    if first is None:
        return {}
    return {f"{name}.bias": _wide(last.bias) + _wide(last.weight) @ first - weight @ keep(first)}


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

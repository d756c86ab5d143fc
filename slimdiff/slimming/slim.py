"""From a dense denoiser, its statistics and a plan to the slim denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimdiff.calibration.calibrate import weights_hash
from slimdiff.denoising.modules import carry_modes, plain, twin, working_copy
from slimdiff.denoising.offloading import present
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence, Factor, Site
from slimdiff.groups.maps import AxisMap, LayerMap, Maps, change_of
from slimdiff.models import fitting_sites, slim_class_of
from slimdiff.plan import Plan
from slimdiff.progress import bar
from slimdiff.settings import Forms, ResnetSettings
from slimdiff.slimming.compensation import DenseOutputs, compensate, dense_rows, stages
from slimdiff.statistics import Statistics

Factors = dict[str, Factor]


def factorise(
    denoiser: nn.Module, statistics: Statistics, sites: Sequence[Site], forms: Forms | None = None
) -> Factors:
    """Each site's basis or order: everything that does not depend on the rank, by site name.

    Sites that never ran in calibration have none.
    """
    forms = forms or Forms()
    modules = dict(denoiser.named_modules())
    factors: Factors = {}
    for site in bar(sites, "factorise", "site"):
        group = GROUPS[site.group]
        if group.covers(site, statistics):
            with present(modules[site.path]):
                factors[site.name] = group.factor(Evidence(modules[site.path], site, statistics, forms))
    return factors


def _is_wide(denoiser: nn.Module, path: str) -> bool:
    """Whether a layer is a convolution of more than one pixel."""
    return cast(Tensor, denoiser.get_submodule(path).weight)[0, 0].numel() > 1


def _weights(denoiser: nn.Module, names: Sequence[str]) -> list[Tensor]:
    return [cast(Tensor, denoiser.get_submodule(name).weight).detach() for name in names]


def _add_changes(maps: Maps, slim: nn.Module, solved: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Put what compensation did after them into the maps of layers, by each layer's dense and local weight."""
    for name, (dense, local) in solved.items():
        own = maps.get(name, LayerMap())
        change = change_of(dense, local, cast(Tensor, slim.get_submodule(name).weight))
        maps[name] = LayerMap(own.out, replace(own.into or AxisMap(), change=change))


def check_ran(sites: Sequence[Site], factors: Factors) -> None:
    for site in sites:
        if site.name not in factors:
            raise InputError(f"the plan slims {site.name}, which never ran in calibration: leave it at its dense rank")


def configuration(denoiser: nn.Module) -> dict[str, Any]:
    """What a dense model's slim class is made with beside the plan.

    A checkpoint's config may have keys that its class does not know: diffusers keeps them, constructors refuse them.
    """
    keys = inspect.signature(slim_class_of(denoiser).__init__).parameters
    return {k: v for k, v in denoiser.config.items() if k in keys}  # type: ignore[union-attr,operator]


def check_statistics(denoiser: nn.Module, statistics: Statistics) -> None:
    """Raises:
    InputError: if the statistics were taken on other weights.
    """
    if statistics.model_hash != weights_hash(denoiser):
        raise InputError("these statistics were taken on another model (its weights differ): calibrate this one")


@own_torch_state()
def slim_denoiser(
    denoiser: nn.Module,
    statistics: Statistics,
    plan: Plan,
    factors: Factors | None = None,
    *,
    fitting_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
    dense_outputs: DenseOutputs | None = None,
    release_dense: bool = False,
    maps: Maps | None = None,
) -> nn.Module:
    """Build the slim model of a plan. Weights that do not change are shared with the dense model, not copied.

    It has the dense model's training mode, hooks, processors and settings such as FreeU's; it is not compiled. A site
    at its dense rank keeps its weights untouched.

    Args:
        factors: from `factorise`, if they are there already.
        fitting_calls: recorded denoiser calls that slim resnets are fitted on and errors compensated, needed if the
            plan has any.
        dense_outputs: on the same calls, if there is more than one slim model to make.
        release_dense: let go of each dense weight when its slim one is made, so that both models never are in memory
            together. The dense model cannot be used afterwards, nor if this fails halfway.
        maps: gets, by path of each layer that changes, how its weight followed from the dense one (see `save_maps`).

    Raises:
        InputError: if statistics or plan are another model's, a slimmed site never ran, or there is no call to fit on.
    """
    asked, denoiser = denoiser, working_copy(denoiser)
    check_statistics(denoiser, statistics)
    if plan.model_hash != statistics.model_hash:
        raise InputError("this plan was made for another model (its weights differ): plan again")
    fitting_sites(denoiser, plan)  # refuse before the long work, not after
    changed = changed_sites(denoiser, plan)
    known = factors or factorise(denoiser, statistics, changed, plan.forms)
    check_ran(changed, known)
    ranks = {site: plan.sites[site.name].rank for site in changed}
    of_sites: dict[str, Maps] = {}
    fitted = fit_groups(denoiser, known, ranks, fitting_calls, resnet_settings, None if maps is None else of_sites)
    mended = stages(denoiser, plan, fitting_calls)
    layers = tuple(layer for stage in mended for layer in stage)
    outputs = (dense_outputs or partial(dense_rows, denoiser, fitting_calls))(layers) if mended else []
    # What mends the stream belongs to a layer's own weight: an update of that has lost nothing there.
    names = [layer.path for layer in layers if layer.stream is None and not _is_wide(denoiser, layer.path)]
    done = bar(name="slim", unit="site", total=len(changed))

    def weights(module: nn.Module, site: Site, rank: int) -> dict[str, Tensor]:
        done.update()
        if site.name in fitted:
            return fitted[site.name]
        evidence = Evidence(module, site, statistics, plan.forms)
        if maps is not None:
            of_sites[site.name] = GROUPS[site.group].maps(evidence, rank, known[site.name])
        return GROUPS[site.group].slim(evidence, rank, known[site.name])

    dense = _weights(denoiser, names) if maps is not None else []
    with done:
        slim = assemble(denoiser, plan, weights, release_dense=release_dense)
    local = _weights(slim, names) if maps is not None else []
    if mended:
        compensate(slim, mended, outputs, fitting_calls)
    if maps is not None:
        places = {site.name: site.path for site in changed}
        maps |= {f"{places[name]}.{path}": own for name, found in of_sites.items() for path, own in found.items()}
        _add_changes(maps, slim, dict(zip(names, zip(dense, local, strict=True), strict=True)))
    carry_modes(asked, slim)
    _release(denoiser, [path for layer in layers for path in layer.paths] if release_dense else ())
    return slim


def _release(denoiser: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        for parameter in denoiser.get_submodule(path).parameters():
            parameter.data = parameter.data.new_empty(0)


def fit_groups(
    denoiser: nn.Module,
    factors: Factors,
    ranks: Mapping[Site, int],
    calls: Sequence[Call],
    settings: ResnetSettings | None = None,
    maps: dict[str, Maps] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """By site name, the weights at these ranks of those sites whose groups are fitted on calls (`Group.fit`)."""
    fitted: dict[str, dict[str, Tensor]] = {}
    more: dict[str, Any] = {} if maps is None else {"maps": maps}
    for name, group in GROUPS.items():
        own = {site: rank for site, rank in ranks.items() if site.group == name}
        if group.fitted and own:
            fitted |= group.fit(denoiser, own, factors, calls, settings, **more)
    return fitted


def changed_sites(denoiser: nn.Module, plan: Plan) -> list[Site]:
    """The plan's sites that lose something, in the model's order."""
    return [s for s in find_sites(denoiser)[0] if s.name in plan.sites and plan.sites[s.name].rank < s.dense_rank]


@own_torch_state()
def assemble(
    denoiser: nn.Module,
    plan: Plan,
    weights: Callable[[nn.Module, Site, int], dict[str, Tensor]],
    *,
    release_dense: bool = False,
) -> nn.Module:
    """The slim model of a plan, with the smaller weights that `weights(module, site, rank)` gives by parameter name.

    `release_dense` is `slim_denoiser`'s.
    """
    denoiser = plain(denoiser)
    slim_class = slim_class_of(denoiser)
    plan = plan.recount()
    fitting_sites(denoiser, plan)
    slim = cast(Any, twin(denoiser, lambda p: nn.Parameter(p.detach(), requires_grad=False)))
    slim.__class__, slim._internal_dict = slim_class, {}
    slim.register_to_config(slim_plan=plan.model_dump(mode="json"), **configuration(denoiser))
    for site in changed_sites(denoiser, plan):
        module, own = denoiser.get_submodule(site.path), slim.get_submodule(site.path)
        smaller = own.state_dict()  # what the rank does not change stays: biases of last layers
        for name, tensor in weights(module, site, plan.sites[site.name].rank).items():
            dense = module.get_parameter(name)
            channels_last = dense.ndim == 4 and dense.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if channels_last and not dense.is_contiguous() else torch.contiguous_format
            smaller[name] = tensor.to(dense).contiguous(memory_format=layout)
            if release_dense:
                dense.data = dense.data.new_empty(0)
        GROUPS[site.group].resize(own, site, plan.sites[site.name].rank)
        own.load_state_dict(smaller, strict=True, assign=True)
    return slim.requires_grad_(False)

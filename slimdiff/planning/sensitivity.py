"""How much each site matters: the change of the noise prediction when it alone is slimmed, by forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimdiff.calibration import distributed
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.groups.group import Evidence, Site
from slimdiff.progress import bar
from slimdiff.settings import Forms, ResnetSettings
from slimdiff.slimming.slim import Factors, fit_groups
from slimdiff.statistics import Statistics


@torch.no_grad()
def measure_sensitivities(
    denoiser: nn.Module,
    statistics: Statistics,
    sites: Sequence[Site],
    factors: Factors,
    calls: Sequence[Call],
    forms: Forms | None = None,
    *,
    fitting_calls: Sequence[Call] = (),
    resnet_settings: ResnetSettings | None = None,
) -> dict[str, float]:
    """How much the noise prediction moves per unit of a site's local error: one site at half rank at a time.

    Under `torchrun` or `accelerate launch`, the processes share the sites out: each must call this, with the same
    arguments, and each returns all of them.

    Returns:
        by site name: relative mean squared change of the noise prediction over the relative local error.

    Raises:
        InputError: if the dense model predicts nothing, or something that is not finite.
    """
    process, processes = distributed.world()
    modules = dict(denoiser.named_modules())

    def measure() -> dict[str, float]:
        reference = [predict(denoiser, call) for call in bar(calls, "dense outputs", "call")]
        energy = sum(float(r.double().square().sum()) for r in reference)
        if not 0 < energy < math.inf:
            what = "zero everywhere" if energy == 0 else "not finite: the model overflows; use it in float32"
            raise InputError(f"the dense model's noise prediction is {what}")
        own = sites[process::processes]
        halves = {site: max(site.multiple, site.dense_rank // 2 // site.multiple * site.multiple) for site in own}
        fitted = fit_groups(denoiser, factors, halves, fitting_calls, resnet_settings)
        result = {}
        for site, rank in bar(halves.items(), "sensitivity", "site"):
            evidence = Evidence(modules[site.path], site, statistics, forms or Forms())
            weights = fitted.get(site.name)
            if weights is None:
                weights = GROUPS[site.group].emulate(evidence, rank, factors[site.name])
            with exchanged(evidence.module, weights):
                changed = sum(
                    float((predict(denoiser, call) - r).double().square().sum())
                    for call, r in zip(calls, reference, strict=True)
                )
            # A site that loses nothing at half rank locally says nothing of its slope; the floor keeps it finite.
            result[site.name] = (changed / energy) / max(float(factors[site.name].tail[rank]), 1e-9)
        return result

    everyone = {name: value for part in distributed.agree(measure) for name, value in part.items()}
    return {site.name: everyone[site.name] for site in sites}


@contextmanager
def exchanged(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A module with other weights, smaller ones too (by parameter name), for the length of a block."""
    before = {name: module.get_parameter(name).data for name in weights}
    try:
        for name, tensor in weights.items():
            module.get_parameter(name).data = tensor.to(before[name])
        yield
    finally:
        for name, data in before.items():
            module.get_parameter(name).data = data

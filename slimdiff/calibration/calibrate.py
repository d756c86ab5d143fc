"""Second moments of a denoiser's inner activations, streamed over real guided trajectories: nothing else is stored."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from slimdiff.adapters import fused_adapters, fused_files
from slimdiff.calibration import distributed
from slimdiff.calibration.observer import Observer
from slimdiff.calibration.turns import Records, split_into_turns
from slimdiff.calibration.weighting import timestep_weigher
from slimdiff.denoising.modules import working_copy
from slimdiff.denoising.offloading import device_of, each_weight, shards_of
from slimdiff.denoising.precision import in_float32
from slimdiff.denoising.torch_state import own_torch_state
from slimdiff.denoising.trajectory import (
    Call,
    Inputs,
    denoiser_name,
    predict,
    sample_batch,
    with_own_attention,
    working_pipeline,
)
from slimdiff.errors import InputError
from slimdiff.groups import find_sites
from slimdiff.groups.group import Site
from slimdiff.progress import AFTER, bar
from slimdiff.prompts import check_inputs
from slimdiff.settings import CalibrationSettings, Sampling, StatisticsSettings
from slimdiff.statistics import Statistics
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights, their names, shapes and dtypes; half precision counts as the same in float32."""
    shards = shards_of(module)
    if shards is not None and shards.digest:  # which takes reading all files
        return shards.digest
    digest, size = hashlib.sha256(), sum(tensor.nbytes for tensor in module.state_dict().values())
    with bar(name="hash weights", unit="B", total=size, unit_scale=True, delay=AFTER, leave=False) as done:
        for name, tensor in each_weight(module):
            done.update(tensor.nbytes)
            tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if shards is not None:
        shards.digest = digest.hexdigest()
    return digest.hexdigest()


@own_torch_state()
def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    settings: CalibrationSettings | None = None,
    *,
    unfinished: Path | None = None,
) -> Statistics:
    """Collect statistics while the pipeline makes images of the prompts (both branches of guidance, every timestep).

    Under `torchrun` or `accelerate launch`, the processes share the prompts out and each returns the sums over all of
    them. Each prompt keeps the noise of its own number, so they equal one process's up to rounding.

    Args:
        prompts: prompts, or mappings of the pipeline's arguments per image (see `slimdiff.denoising.trajectory`).
        unfinished: a folder for what is done so far, recorded about once a minute. Given it again with the same model,
            prompts and settings, the calibration goes on from there, and its result is the same as without the
            interruption. It may be deleted when the statistics are saved.

    Raises:
        InputError: if there is no prompt, the pipeline needs other arguments, an adapter is attached to the denoiser,
            nothing in it can be slimmed, or an activation is not finite.
    """
    settings = settings or CalibrationSettings()
    chosen = check_inputs(prompts)[: settings.samples]
    if not chosen:
        raise InputError("there is no prompt to calibrate with: give at least one non-empty line")
    sampling, pipeline = settings.sampling, in_float32(working_pipeline(pipeline))
    denoiser, scheduler = getattr(pipeline, denoiser_name(pipeline)), getattr(pipeline, "scheduler", None)

    def run(numbers: Sequence[int]) -> None:
        with with_own_attention(denoiser):
            sample_batch(pipeline, chosen, numbers, sampling)

    made_from: dict[str, Any] = {"prompts": len(chosen), "settings": settings.model_dump()}
    if fused := fused_adapters(pipeline):
        made_from["fused_adapters"] = fused
    if loras := fused_files(pipeline):
        made_from["lora"] = loras
    identity = [str(prompt) for prompt in chosen]
    return _collect(denoiser, run, len(chosen), settings, scheduler, made_from, sampling, identity, unfinished)


@own_torch_state()
def calibrate_on_calls(
    denoiser: nn.Module,
    calls: Sequence[Call],
    settings: StatisticsSettings | None = None,
    *,
    scheduler: Any = None,
) -> Statistics:
    """Collect statistics from calls of the denoiser alone, for models whose pipeline cannot be run or does not exist.

    Args:
        calls: as `record_calls` gives them, or made by hand; arguments as the denoiser's `forward` names them.
        scheduler: what `settings.timestep_weights` are taken from, if they are not uniform.

    Raises:
        InputError: if there is no call, an adapter is attached to the denoiser, nothing in it can be slimmed, or an
            activation is not finite.
    """
    settings = settings or StatisticsSettings()
    if not calls:
        raise InputError(
            "there is no call to calibrate with: record at least one (slimdiff.denoising.trajectory.record_calls)"
        )

    denoiser = working_copy(denoiser)

    def run(numbers: Sequence[int]) -> None:
        for number in numbers:
            predict(denoiser, calls[number])

    own = settings.model_dump(include=set(StatisticsSettings.model_fields))
    made_from = {"calls": len(calls), "settings": own}
    return _collect(denoiser, run, len(calls), settings, scheduler, made_from)


def _collect(
    denoiser: nn.Module,
    run: Callable[[Sequence[int]], None],
    count: int,
    settings: StatisticsSettings,
    scheduler: Any,
    made_from: dict[str, Any],
    sampling: Sampling | None = None,
    identity: Any = None,
    unfinished: Path | None = None,
) -> Statistics:
    """Statistics over all items, prompts or recorded calls, dealt over turns of sites and over processes.

    Args:
        run: makes the denoiser do what it does for the items of these numbers; there are `count` of them.
        sampling: how prompts are run; None for calls, which are steps of one trajectory.
        identity: what tells these items from others, for going on with an unfinished calibration.
    """
    batch, steps = (sampling.batch, sampling.steps) if sampling else (1, 1)
    weigh = timestep_weigher(settings.timestep_weights, scheduler)
    groups = _turns(denoiser, count, settings)
    process, processes = distributed.world()
    own_hash = weights_hash(denoiser)
    key = manifest.fingerprint([own_hash, made_from, identity, batch, process, processes])
    records = Records(unfinished, key, process, len(groups))
    dealt = [range(turn, count, len(groups)) for turn in range(len(groups))]

    def take(turn: int) -> Statistics:
        """The sums of one turn's sites over this process's share of its items."""
        mine = dealt[turn][process::processes]
        statistics, done = records.begin(turn, len(mine), device_of(denoiser))
        statistics = statistics or Statistics(own_hash)
        done_bar.update(min(done, len(mine)))
        observer = Observer(statistics, settings.tokens_per_dimension, weigh)
        with observer.watching(denoiser, groups[turn]):
            for start in range(done, len(mine), batch):
                numbers = mine[start : start + batch]
                observer.step = -1 if sampling else numbers[0] - 1
                observer.calls = len(dealt[turn]) * steps / len(numbers)
                run(numbers)
                done_bar.update(len(numbers))
                if start + batch < len(mine):
                    records.keep(statistics, turn, start + batch)
        return statistics if done >= len(mine) else records.finish(statistics, turn, len(mine))

    parts: list[Statistics] = []

    def collect() -> str:
        parts.extend(take(turn) for turn in range(len(groups)))
        return own_hash

    with bar(name="calibrate", unit="image", total=sum(len(turn[process::processes]) for turn in dealt)) as done_bar:
        everyone = distributed.agree(collect)
    if len(set(everyone)) > 1:
        raise InputError("the processes calibrate different weights: load the same model in each")
    if processes > 1:
        parts = [records.total(distributed.sum_statistics(part), turn) for turn, part in enumerate(parts)]
    whole = parts[0].merge(*parts[1:]) if len(parts) > 1 else parts[0]
    whole.made_from = made_from
    _warn_of_few_tokens(whole)
    return whole


def _turns(denoiser: nn.Module, items: int, settings: StatisticsSettings) -> list[list[Site]]:
    """The denoiser's sites by turn.

    Raises:
        InputError: if there is nothing to slim, or there are more turns than items.
    """
    sites, left_dense = find_sites(denoiser)
    if not sites:
        reasons = "; ".join(sorted({d["reason"] for d in left_dense})) or "it has no attention or feed-forward module"
        raise InputError(f"{type(denoiser).__name__} has nothing to slim: {reasons}")
    groups = split_into_turns(sites, settings)
    if len(groups) > items:
        raise InputError(
            f"moments of {len(sites)} sites need {len(groups)} turns of {settings.memory_limit:g} GiB each, "
            f"but there are {items} prompts to share out: raise memory_limit, or give more prompts"
        )
    return groups


def _warn_of_few_tokens(statistics: Statistics) -> None:
    few = {name: len(first) for name, first in statistics.firsts.items() if statistics.tokens[name] < len(first)}
    if few:
        name, width = next(iter(few.items()))
        log.warning(
            "%d sites saw fewer tokens than they have dimensions (%s: %d of %d), so their statistics are singular: "
            "calibrate with more prompts",
            len(few),
            name,
            statistics.tokens[name],
            width,
        )

"""Second moments of a denoiser's inner activations, streamed over real guided trajectories: nothing else is stored."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from slimdiff.adapters import fused_adapters, refuse_adapters
from slimdiff.calibration import distributed
from slimdiff.calibration.observer import Observer
from slimdiff.calibration.weighting import timestep_weigher
from slimdiff.denoising.trajectory import Call, Inputs, denoiser_name, predict, sample_images, usable_inputs
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Site
from slimdiff.settings import CalibrationSettings, StatisticsSettings
from slimdiff.statistics import Statistics, Stored, read_metadata
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")

# Seconds between records of an unfinished calibration, and how many times longer than writing one that must be.
RECORD_EVERY = 60.0
RECORD_SHARE = 20


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's weights, their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[Inputs],
    settings: CalibrationSettings | None = None,
    *,
    unfinished: Path | None = None,
    progress: str | None = "calibrate",
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
    chosen = usable_inputs(prompts)[: settings.samples]
    if not chosen:
        raise InputError("there is no prompt to calibrate with: give at least one non-empty line")
    sampling = settings.sampling

    def run(numbers: Sequence[int]) -> None:
        images = [chosen[n] for n in numbers]
        sample_images(pipeline, images, sampling, numbers=numbers, output_type="latent")

    made_from: dict[str, Any] = {"prompts": len(chosen), "settings": settings.model_dump()}
    if fused := fused_adapters(pipeline):
        made_from["fused_adapters"] = fused
    collection = _Collection(
        getattr(pipeline, denoiser_name(pipeline)),
        settings,
        timestep_weigher(settings.timestep_weights, getattr(pipeline, "scheduler", None)),
        run,
        items=len(chosen),
        batch=sampling.batch,
        calls=sampling.steps,
        made_from=made_from,
        unfinished=unfinished,
        identity=[str(prompt) for prompt in chosen],
    )
    return collection.collect(progress)


def calibrate_on_calls(
    denoiser: nn.Module,
    calls: Sequence[Call],
    settings: StatisticsSettings | None = None,
    *,
    scheduler: Any = None,
    progress: str | None = None,
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
        raise InputError("there is no call to calibrate with: record at least one (slimdiff.trajectory.record_calls)")

    def run(numbers: Sequence[int]) -> None:
        for number in numbers:
            predict(denoiser, calls[number])

    own = {name: getattr(settings, name) for name in StatisticsSettings.model_fields}
    collection = _Collection(
        denoiser,
        settings,
        timestep_weigher(settings.timestep_weights, scheduler),
        run,
        items=len(calls),
        batch=1,
        calls=1,
        made_from={"calls": len(calls), "settings": own},
        successive=True,
    )
    return collection.collect(progress)


class _Collection:
    """One calibration: items (prompts or calls), dealt over turns of sites, over processes, and over batches.

    Args:
        run: makes the denoiser do what it does for the items of these numbers.
        items: how many there are.
        batch: at a time.
        calls: denoiser calls per batch.
        successive: whether items are steps of a trajectory, instead of each passing through all of them.
        identity: what tells these items from others, for going on with an unfinished calibration.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        settings: StatisticsSettings,
        weigh: Callable[[float], float],
        run: Callable[[Sequence[int]], None],
        *,
        items: int,
        batch: int,
        calls: int,
        made_from: dict[str, Any],
        successive: bool = False,
        unfinished: Path | None = None,
        identity: Any = None,
    ) -> None:
        refuse_adapters(denoiser)
        sites, left_dense = find_sites(denoiser)
        if not sites:
            reasons = "; ".join(sorted({d["reason"] for d in left_dense})) or (
                "it has no attention or feed-forward module"
            )
            raise InputError(f"{type(denoiser).__name__} has nothing to slim: {reasons}")
        self.denoiser = denoiser
        self.settings = settings
        self.weigh = weigh
        self.run = run
        self.items, self.batch, self.calls, self.successive = items, batch, calls, successive
        self.made_from = made_from
        self.rank, self.size = distributed.world()
        self.turns = turns(sites, settings)
        if len(self.turns) > items:
            raise InputError(
                f"moments of {len(sites)} sites need {len(self.turns)} turns of {settings.memory_limit:g} GiB each, "
                f"but there are {items} prompts to share out: raise memory_limit, or give more prompts"
            )
        self.model_hash = weights_hash(denoiser)
        self.temporary = None
        if unfinished is None and len(self.turns) > 1:
            self.temporary = tempfile.TemporaryDirectory(prefix="slimdiff-")
            unfinished = Path(self.temporary.name)
        self.folder = unfinished
        self.key = manifest.fingerprint([self.model_hash, made_from, identity, batch, self.rank, self.size])

    def collect(self, progress: str | None) -> Statistics:
        """All turns, and the sums over all processes."""
        parts: list[Statistics] = []
        failure = None
        mine = sum(len(self._dealt(turn)[self.rank :: self.size]) for turn in range(len(self.turns)))
        try:
            with tqdm(total=mine, desc=progress, disable=progress is None or self.rank > 0, unit="image") as bar:
                for turn in range(len(self.turns)):
                    parts.append(self._turn(turn, bar))
        except InputError as error:
            failure = str(error)
        told = distributed.agree(failure, self.model_hash)
        if len(set(told)) > 1:
            raise InputError("the processes calibrate different weights: load the same model in each")
        if self.size > 1:
            parts = [self._over_all(part, turn) for turn, part in enumerate(parts)]
        whole = parts[0].merge(*parts[1:]) if len(parts) > 1 else parts[0]
        whole.made_from = self.made_from
        _warn_of_few_tokens(whole)
        return whole

    def _dealt(self, turn: int) -> range:
        """Numbers of the items that a turn's sites are watched with."""
        return range(turn, self.items, len(self.turns))

    def _turn(self, turn: int, bar: Any) -> Statistics:
        dealt = self._dealt(turn)
        mine = dealt[self.rank :: self.size]
        file = self.folder / f"process-{self.rank}-turn-{turn}.safetensors" if self.folder else None
        statistics, done = self._recorded(file, len(mine))
        bar.update(min(done, len(mine)))
        observer = Observer(
            statistics,
            tokens_per_dimension=self.settings.tokens_per_dimension,
            weigh=self.weigh,
        )
        wait, written = RECORD_EVERY, time.monotonic()
        with observer.watching(self.denoiser, self.turns[turn]):
            for start in range(done, len(mine), self.batch):
                numbers = mine[start : start + self.batch]
                first = numbers[0] if self.successive else 0
                observer.begin_trajectory(first, len(dealt) * self.calls / len(numbers))
                self.run(numbers)
                bar.update(len(numbers))
                if file and time.monotonic() - written > wait and start + self.batch < len(mine):
                    begun = time.monotonic()
                    statistics.save(file, done=start + self.batch, key=self.key)
                    written = time.monotonic()
                    wait = max(RECORD_EVERY, RECORD_SHARE * (written - begun))
        if file is None or done >= len(mine):
            return statistics
        statistics.save(file, done=len(mine), key=self.key)
        return self._opened(file) if len(self.turns) > 1 else statistics

    def _recorded(self, file: Path | None, wanted: int) -> tuple[Statistics, int]:
        """What an interrupted run of the same calibration left of a turn, and how many of its items that is."""
        try:
            meta = read_metadata(file) if file is not None and file.is_file() else {}
        except InputError:  # of another version, or not whole: no reason to refuse what can be done again
            meta = {}
        if file is None or meta.get("key") != self.key:
            return Statistics(self.model_hash), 0
        found, done = self._opened(file), meta["done"]
        if done < wanted or len(self.turns) == 1:
            device = next(self.denoiser.parameters()).device
            found.moments, found.firsts = (
                {name: tensor.to(device, copy=True) for name, tensor in stored.items()}
                for stored in (found.moments, found.firsts)
            )
        return found, done

    def _opened(self, file: Path) -> Statistics:
        found = Statistics.load(file)
        for stored in (found.moments, found.firsts):
            assert isinstance(stored, Stored)
            stored.owner = self.temporary
        return found

    def _over_all(self, part: Statistics, turn: int) -> Statistics:
        """A turn's sums over all processes."""
        counts = ("tokens", "weights", "population")
        own = {
            **{kind: getattr(part, kind) for kind in counts},
            "moments": _shapes(part.moments),
            "firsts": _shapes(part.firsts),
        }
        everyone = distributed.agree(None, own)
        shapes = {kind: {n: s for told in everyone for n, s in told[kind].items()} for kind in ("moments", "firsts")}
        total = Statistics(
            self.model_hash,
            distributed.AllReduced(part.moments, shapes["moments"], torch.float32),
            distributed.AllReduced(part.firsts, shapes["firsts"], torch.float64),
            **{
                kind: {n: sum(told[kind].get(n, 0) for told in everyone) for told in everyone for n in told[kind]}
                for kind in counts
            },
        )
        if len(self.turns) == 1 or self.folder is None:
            total.moments, total.firsts = dict(total.moments), dict(total.firsts)
            return total
        file = self.folder / f"process-{self.rank}-sum-{turn}.safetensors"
        total.save(file)
        return self._opened(file)


def turns(sites: Sequence[Site], settings: StatisticsSettings) -> list[list[Site]]:
    """Sites in as few groups as the memory limit allows, in the model's order and of about the same size.

    A site that needs more than the limit makes a group of its own.
    """
    needs = [GROUPS[site.group].moment_bytes(site) for site in sites]

    def filled(limit: float) -> list[list[Site]]:
        groups: list[list[Site]] = [[]]
        used = 0
        for site, need in zip(sites, needs, strict=True):
            if groups[-1] and used + need > limit:
                groups.append([])
                used = 0
            groups[-1].append(site)
            used += need
        return groups

    limit = settings.memory_limit * 2**30
    fewest = len(filled(limit))
    even = sum(needs) / fewest
    while even < limit and len(filled(even)) > fewest:
        even *= 1.02
    return filled(min(even, limit))


def _shapes(tensors: Any) -> dict[str, list[int]]:
    if isinstance(tensors, Stored):
        return {name: tensors.shape(name) for name in tensors}
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _warn_of_few_tokens(statistics: Statistics) -> None:
    few = [
        (name, statistics.tokens[name], len(statistics.firsts[name]))
        for name in statistics.firsts
        if statistics.tokens[name] < len(statistics.firsts[name])
    ]
    if few:
        name, tokens, width = few[0]
        log.warning(
            "%d sites saw fewer tokens than they have dimensions (%s: %d of %d), so their statistics are singular: "
            "calibrate with more prompts",
            len(few),
            name,
            tokens,
            width,
        )

"""Recorded calls of one denoiser for each purpose, made when first asked for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

from diffusers import DiffusionPipeline

from slimdiff.denoising.trajectory import Call, Inputs, record_calls
from slimdiff.errors import InputError
from slimdiff.prompts import check_inputs
from slimdiff.settings import CalibrationSettings, PlanSettings, Sampling

log = logging.getLogger("slimdiff")

# What each kind of recorded calls is for, as an error says it.
PURPOSES = {
    "sensitivity": "sensitivities, block influences and MACs are measured",
    "fitting": "slim resnets are fitted and errors compensated",
    "held": "max_error is measured",
}

MOST_IMAGES = 8
"""Whose calls sensitivities are measured on at a time: more calls say more than more images do."""


class Calls:
    """A denoiser's calls, recorded when first asked for; calibration sees the first `calibration.samples` prompts."""

    def __init__(
        self,
        pipeline: DiffusionPipeline | None,
        prompts: Sequence[Inputs] = (),
        calibration: CalibrationSettings | None = None,
        planning: PlanSettings | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.prompts = check_inputs(prompts)
        self.calibration = calibration or CalibrationSettings()
        self.planning = planning or PlanSettings()

    @classmethod
    def of(cls, sensitivity: Sequence[Call] = (), *, fitting: Sequence[Call] = (), held: Sequence[Call] = ()) -> Calls:
        """Calls that are there already, for a denoiser without a pipeline; an empty list is missing."""
        calls = cls(None)
        ready = {"sensitivity": sensitivity, "fitting": fitting, "held": held}
        vars(calls).update({name: list(some) for name, some in ready.items() if some})
        return calls

    def has(self, name: str) -> bool:
        """Whether calls of this name are recorded already."""
        return name in vars(self)

    def gives(self, name: str) -> bool:
        """Whether calls of this name are recorded, or can be."""
        return self.has(name) or (self.pipeline is not None and bool(self.prompts))

    @cached_property
    def sensitivity(self) -> list[Call]:
        """At most `planning.sensitivity_calls` of them, spread evenly over one batch of trajectories.

        That batch is of `MOST_IMAGES` at most. Its prompts are ones that calibration has not seen, if there are any: a
        stream of text holds few different tokens, so a site of it can be exact on those and far off on others.

        Raises:
            InputError: if they are not there and no pipeline can make them; so do `fitting` and `held`.
        """
        seen, sampling = self.calibration.samples, self.calibration.sampling
        # From the end: `held` begins at the front.
        if fresh := self.prompts[seen:][-min(MOST_IMAGES, sampling.batch) :]:
            return self._spread("sensitivity", fresh, sampling.model_copy(update={"seed": sampling.seed + seen}))
        if self.prompts:
            log.info(
                "sensitivities are measured on prompts of the calibration: with more than %d prompts, on unseen ones",
                seen,
            )
        return self._spread("sensitivity", self.prompts[:MOST_IMAGES], sampling)

    @cached_property
    def fitting(self) -> list[Call]:
        """At most `planning.fitting_calls` of them, spread over all images of the calibration."""
        chosen, sampling = self.prompts[: self.calibration.samples], self.calibration.sampling
        source = self._source("fitting")
        batches, most = -(-len(chosen) // sampling.batch), self.planning.fitting_calls
        every = -(-batches * sampling.steps // most)
        every += batches == 1 and every % 2 == 0  # or guidance's branches, called in turn, would be one alone
        # Of a scheduler that calls more than once a step these are too many.
        return evenly(record_calls(source, chosen, sampling, every=every, staggered=True), most)

    @cached_property
    def held(self) -> list[Call]:
        """As many as for sensitivities, of what calibration has not seen: its own noise, and other prompts if any."""
        fresh = self.prompts[self.calibration.samples :] or self.prompts
        sampling = self.calibration.sampling
        noise = sampling.model_copy(update={"seed": sampling.seed + len(self.prompts)})
        return self._spread("held", fresh, noise)

    def _spread(self, name: str, prompts: Sequence[Inputs], sampling: Sampling) -> list[Call]:
        calls = record_calls(self._source(name), prompts[: sampling.batch], sampling)
        return evenly(calls, self.planning.sensitivity_calls)

    def _source(self, name: str) -> DiffusionPipeline:
        if self.pipeline is None:
            where = f"slimdiff.denoising.calls.Calls.of({name}=...)"
            raise InputError(f"{PURPOSES[name]} on recorded denoiser calls: give some ({where})")
        if not self.prompts:
            raise InputError(f"{PURPOSES[name]} on recorded denoiser calls: give at least one non-empty prompt")
        return self.pipeline


def evenly(calls: list[Call], most: int) -> list[Call]:
    """At most this many of them, evenly spread; in turn of each branch, where guidance calls them one by one."""
    times = [list(same) for _, same in groupby(calls, key=lambda call: call.timestep)]
    count, branches = min(most, len(calls)), len(times[0])
    if any(len(same) != branches for same in times):
        return [calls[i * len(calls) // count] for i in range(count)]
    chosen: list[Call] = []
    for time, taken in sorted(Counter(i * len(times) // count for i in range(count)).items()):
        chosen += [times[time][b] for b in sorted((len(chosen) + n) % branches for n in range(taken))]
    return chosen

"""Every scheduler of diffusers under a schedule: followed step by step, or refused in one line."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from families.family import TWO_LEVELS
from families.schedulers import schedulers_of

from slimdiff import Sampling, load_pipeline
from slimdiff.denoising.scheduled import Scheduled, TorchPasses, schedule_pipeline
from slimdiff.denoising.schedulers import SHORT, make_scheduler
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.schedule import make_schedule

STEPS = 8
NOT_FOLLOWED = ("no schedule can follow it", "lists no times")


class Exact(TorchPasses):
    """Computes the whole network in every step, and sees that shallow ones get the state of the last whole one."""

    def __init__(self, unet: Any):
        super().__init__(unet)
        self.whole_at: list[float] = []
        self.shallow_passes = 0

    def whole(self, arguments, depth):
        noise, _ = super().whole(arguments, None)
        self.whole_at.append(float(arguments["timestep"]))
        return noise, noise.new_full((len(noise), 1, 1, 1), self.whole_at[-1])

    def shallow(self, arguments, depth, kept):
        assert float(kept.flatten()[0]) == pytest.approx(self.whole_at[-1])
        self.shallow_passes += 1
        return super().whole(arguments, None)[0]


@pytest.fixture(scope="module")
def tiny():
    return tiny_pipeline(**TWO_LEVELS)


def run(pipeline: Any) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    asked = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
    torch.manual_seed(0)  # some draw from the global generator
    return pipeline(PROMPTS[:2], **asked)[0]


def check(tiny: Any, scheduler: Any) -> None:
    """What is reused is what the last whole step of the same picture left, and nothing else of the picture changes."""
    pipeline = copy.copy(tiny)
    pipeline.scheduler = scheduler
    plain = run(pipeline)
    scheduled = schedule_pipeline(pipeline, schedule := make_schedule(2, STEPS, deep_every=3))
    scheduled.unet = Scheduled(passes := Exact(tiny.unet), schedule)
    for _ in range(2):
        torch.testing.assert_close(run(scheduled), plain, rtol=0, atol=0, equal_nan=True)
    calls = len(scheduler.timesteps)
    assert len(passes.whole_at) == 2 * len(schedule.at(calls).whole)
    assert passes.shallow_passes == 2 * calls - len(passes.whole_at)


@pytest.mark.parametrize("name", ["ddim", "dpm2_a", "dpmpp_2m", "dpmpp_single", "heun", "lcm", "pndm", "unipc"])
def test_a_sampler_is_followed(name, tiny):
    """Also one that calls several times a step, or at one time twice."""
    check(tiny, make_scheduler(tiny.scheduler, name))


@pytest.mark.slow
def test_every_scheduler_is_followed_or_refused_in_one_line(tiny):
    refused = set()
    for name, scheduler in schedulers_of(tiny, lambda: run(tiny)).items():
        try:
            check(tiny, scheduler)
        except InputError as error:
            assert any(said in str(error) for said in NOT_FOLLOWED), error
            refused.add(name)
    assert not refused  # every pipeline lists the times that it calls at


LEAST = {"lcm": 20, "pndm": 15}
"""dB, where it is not 30: these carry a jump of guidance further, by noise and by extrapolation from earlier steps."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHORT if name != "dpmpp_sde"])  # which the model does not take
def test_a_trained_models_images_stay_what_they_are_with_any_sampler(name):
    """The embedded model's, with the deep part in every second step and guidance in all but the last fifth."""
    pipeline = load_pipeline("demo")
    sampling = Sampling(steps=20, batch=4, scheduler=name, seed=3)
    schedule = make_schedule(3, 20, guidance_interval=(0, 0.8), deep_every=2, depth="up_blocks.1")
    plain, scheduled = (sample_images(p, PROMPTS, sampling) for p in (pipeline, schedule_pipeline(pipeline, schedule)))
    found = image_fidelity(plain, scheduled)["psnr_db"]
    assert LEAST.get(name, 30) < found < math.inf

"""A pipeline that makes its images by a schedule: exact where it must be, and never from what another picture left."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline, tiny_unet
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPAGPipeline,
)
from families.images import instruct_pix2pix, unconditional, xl
from families.steering import make_adapter, make_controlnet, picture
from families.tasks import latent_upscaler, upscaler

from slimdiff import Sampling, compress
from slimdiff.denoising.scheduled import Scheduled, TorchPasses, schedule_pipeline
from slimdiff.denoising.trajectory import sample_images
from slimdiff.errors import InputError
from slimdiff.schedule import Schedule, make_schedule

EVERY_3RD = make_schedule(3, 6, deep_every=3, depth="up_blocks.1")
BOTH = make_schedule(3, 6, guidance_interval=(0, 0.5), deep_every=3)


class Watched(TorchPasses):
    """Notes each pass and its samples; with `exact`, shallow passes run the whole network."""

    def __init__(self, unet: Any, exact: bool = False):
        super().__init__(unet)
        self.ran: list[tuple[str, int]] = []
        self.exact = exact

    def whole(self, arguments, depth):
        self.ran.append(("whole", len(arguments["sample"])))
        return super().whole(arguments, depth)

    def shallow(self, arguments, depth, kept):
        self.ran.append(("shallow", len(arguments["sample"])))
        return super().whole(arguments, None)[0] if self.exact else super().shallow(arguments, depth, kept)


def watched(pipeline: DiffusionPipeline, schedule: Schedule, exact: bool = False) -> tuple[Any, Watched]:
    other = schedule_pipeline(pipeline, schedule)
    other.unet = Scheduled(passes := Watched(pipeline.unet, exact), schedule)
    return other, passes


def latents(pipeline: Any, *prompts: str, seed: int = 0, **more: Any) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(seed + number) for number in range(len(prompts))]
    asked = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent", "generator": noise}
    return pipeline(list(prompts), **{**asked, **more})[0]


@pytest.mark.parametrize("depth", [None, "up_blocks.1", "up_blocks.2"])
def test_the_full_schedule_makes_the_plain_pipelines_images_to_the_bit(pipeline, depth):
    full = Schedule(levels=3, steps=6, depth=depth, guided=[*range(6)], whole=[*range(6)])
    assert torch.equal(latents(pipeline, *PROMPTS), latents(schedule_pipeline(pipeline, full), *PROMPTS))
    sampling = Sampling(steps=6, batch=2)
    plain, scheduled = (sample_images(p, PROMPTS, sampling) for p in (pipeline, schedule_pipeline(pipeline, full)))
    assert [image.tobytes() for image in plain] == [image.tobytes() for image in scheduled]


UNETS = {
    "as Stable Diffusion's": ({"layers_per_block": 2}, (8, 8)),
    "odd sides": ({}, (10, 7)),
    "no attention at the edge": (
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
        (8, 8),
    ),
    "other blocks": (
        {
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        },
        (8, 8),
    ),
    "no middle": ({"mid_block_type": None}, (8, 8)),
}


def steering(unet: Any, kind: str, sample: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    """A ControlNet's residuals or an adapter's features for a call, as pipelines give them."""
    torch.manual_seed(3)
    if kind == "controlnet":
        size = [2 * side for side in sample.shape[-2:]]
        shown = torch.rand(len(sample), 3, *size)
        down, middle = make_controlnet(unet)(sample, 7, text, shown, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    features, side = [], sample.shape[-1]
    for block in unet.down_blocks:  # with attention they are added before the downsampler, else behind it
        after = side // 2 if block.downsamplers is not None else side
        at = side if getattr(block, "has_cross_attention", False) else after
        features.append(torch.rand(len(sample), block.resnets[-1].out_channels, at, at))
        side = after
    return {"down_intrablock_additional_residuals": features}


STEERED = [("as Stable Diffusion's", by) for by in ("controlnet", "adapter", "FreeU")]
STEERED += [("no attention at the edge", "adapter"), *((kind, "") for kind in UNETS)]


@pytest.mark.parametrize("depth", ["up_blocks.1", "up_blocks.2"])
@pytest.mark.parametrize(("kind", "steered"), STEERED)
@torch.no_grad()
def test_a_shallow_pass_on_its_own_steps_state_is_the_whole_one_to_the_bit(kind, depth, steered):
    config, size = UNETS[kind]
    unet = tiny_unet(**config)
    if steered == "FreeU":
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    sample, text = torch.randn(4, 4, *size), torch.randn(4, 5, 32)
    more = steering(unet, steered, sample, text) if steered in ("controlnet", "adapter") else {}
    arguments = {"sample": sample, "timestep": torch.tensor(7), "encoder_hidden_states": text}

    def given() -> dict[str, Any]:  # diffusers takes adapters' features off the list
        return {**arguments, **{name: list(v) if isinstance(v, list | tuple) else v for name, v in more.items()}}

    passes = TorchPasses(unet, depth)
    noise, kept = passes.whole(given(), depth)
    assert torch.equal(noise, unet(**given()).sample) and kept is not None
    for _ in range(2):  # FreeU writes into what enters a block
        assert torch.equal(passes.shallow(given(), depth, kept), noise)
    moved = passes.shallow({**given(), "timestep": torch.tensor(900)}, depth, kept)
    assert not torch.equal(moved, noise)  # the parts that do run see the step


def controlled() -> DiffusionPipeline:
    parts = tiny_pipeline().components
    return StableDiffusionControlNetPipeline(
        **parts, controlnet=make_controlnet(parts["unet"]), requires_safety_checker=False
    )


def adapted() -> DiffusionPipeline:
    parts = tiny_pipeline().components
    parts.pop("image_encoder", None)
    return StableDiffusionAdapterPipeline(**parts, adapter=make_adapter((32, 64, 64)), requires_safety_checker=False)


SHOWN = {"image": [picture(0), picture(1)]}
GUIDED = {
    "text to image": (tiny_pipeline, {}),
    "text to image, rescaled": (tiny_pipeline, {"guidance_rescale": 0.7}),
    "SDXL": (xl, {}),
    "ControlNet": (controlled, SHOWN),
    "ControlNet that guesses": (controlled, {**SHOWN, "guess_mode": True}),
    "T2I-Adapter": (adapted, SHOWN),
    "InstructPix2Pix": (instruct_pix2pix, SHOWN),
}


@pytest.mark.parametrize("kind", GUIDED)
def test_no_guidance_in_any_step_is_the_pipeline_without_guidance(kind):
    make, more = GUIDED[kind]
    pipeline: Any = make()
    pipeline.set_progress_bar_config(disable=True)
    levels = len(pipeline.unet.config["up_block_types"])
    none = Schedule(levels=levels, steps=6, guided=[], whole=[*range(6)])
    scheduled, passes = watched(pipeline, none)
    found = latents(scheduled, *PROMPTS[:2], **more)
    assert passes.ran == [("whole", 2)] * 6
    if kind == "ControlNet that guesses":  # by itself it does so only beside guidance
        none = Schedule(levels=levels, steps=6, guided=[*range(6)], whole=[*range(6)])
        assert not torch.equal(found, latents(schedule_pipeline(pipeline, none), *PROMPTS[:2], **more))
        return
    expected = latents(pipeline, *PROMPTS[:2], **{**more, "guidance_scale": 1.0})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    guided = latents(pipeline, *PROMPTS[:2], **more)
    assert not torch.allclose(found, guided, rtol=1e-2, atol=1e-2)


def test_each_step_runs_what_the_schedule_says(pipeline):
    scheduled, passes = watched(pipeline, BOTH)
    first = latents(scheduled, *PROMPTS)
    one = [("whole", 8), ("shallow", 8), ("shallow", 8), ("whole", 4), ("shallow", 4), ("shallow", 4)]
    assert passes.ran == one
    # What a guided step left serves an unguided one: the branch of the prompt.
    mixed = Schedule(levels=3, steps=6, depth="up_blocks.2", guided=[0, 1, 4], whole=[0, 4])
    other, passes = watched(pipeline, mixed)
    latents(other, *PROMPTS)
    assert passes.ran == [("whole", 8), ("shallow", 8), ("shallow", 4), ("shallow", 4), ("whole", 8), ("shallow", 4)]
    assert torch.equal(latents(scheduled, *PROMPTS), first)  # two pictures by one denoiser are alike
    # Without guidance by the pipeline itself, depth alone counts.
    scheduled, passes = watched(pipeline, BOTH)
    latents(scheduled, *PROMPTS, guidance_scale=1.0)
    assert passes.ran == [(how, 4) for how, _ in one]


def test_another_number_of_steps_is_carried_over_and_said(pipeline, caplog):
    scheduled, passes = watched(pipeline, EVERY_3RD)
    with caplog.at_level(logging.WARNING, "slimdiff"):
        latents(scheduled, PROMPTS[0], num_inference_steps=12)
    assert [step for step, (how, _) in enumerate(passes.ran) if how == "whole"] == [0, 6]
    assert "the schedule is for 6 calls of the UNet: it is carried over to 12 by trajectory fraction" in caplog.text


def test_image_to_image_begins_late_and_whole(pipeline):
    """By diffusers' own pipeline of the same parts."""
    scheduled, passes = watched(pipeline, EVERY_3RD)
    other: Any = AutoPipelineForImage2Image.from_pipe(scheduled)
    other.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    other(PROMPTS[0], image=picture(0), strength=0.7, num_inference_steps=6, guidance_scale=3.0, generator=noise)
    assert [how for how, _ in passes.ran] == ["whole", "whole", "shallow", "shallow"]  # steps 2, 3, 4 and 5


def _stop_after(step: int) -> Any:
    def callback(pipe: Any, at: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = at == step
        return kept

    return callback


def _fail_after(step: int) -> Any:
    def callback(_pipe: Any, at: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise KeyboardInterrupt
        return kept

    return callback


@pytest.mark.parametrize("stop", [_stop_after, _fail_after])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_interrupted_picture_leaves_nothing_behind(pipeline, stop, step):
    expected = latents(schedule_pipeline(pipeline, EVERY_3RD), PROMPTS[1], seed=5)
    scheduled, passes = watched(pipeline, EVERY_3RD)
    with contextlib.suppress(KeyboardInterrupt):
        latents(scheduled, PROMPTS[0], callback_on_step_end=stop(step))
    kept = scheduled.unet._kept
    assert kept is not None and kept.state is not None
    kept.state.fill_(torch.nan)  # planted: whatever reads it gives no numbers
    passes.ran.clear()
    assert torch.equal(latents(scheduled, PROMPTS[1], seed=5), expected)
    # A picture that begins where the other stopped does not go on with that.
    latents(scheduled, PROMPTS[0], callback_on_step_end=_stop_after(step))
    scheduled.unet._kept.state.fill_(torch.nan)
    passes.ran.clear()
    other: Any = AutoPipelineForImage2Image.from_pipe(scheduled)
    other.set_progress_bar_config(disable=True)
    strength = 1 - (step + 1) / 6 + 1e-6
    found = other(PROMPTS[0], image=picture(0), strength=strength, num_inference_steps=6, output_type="latent")[0]
    assert passes.ran[0][0] == "whole" and bool(found.isfinite().all())


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_interrupted_upscaler_leaves_nothing_behind(step):
    """Its calls have the small picture beside the latents, and it takes a callback of the older kind."""
    own: Any = upscaler()
    schedule = make_schedule(2, 6, deep_every=3)

    def stop(at: int, _time: Any, _latents: Any) -> None:
        if at == step:
            raise KeyboardInterrupt

    shown = {"image": [picture(0)]}
    expected = latents(schedule_pipeline(own, schedule), PROMPTS[1], seed=5, **shown)
    scheduled, passes = watched(own, schedule)
    with pytest.raises(KeyboardInterrupt):
        latents(scheduled, PROMPTS[0], callback=stop, **shown)
    scheduled.unet._kept.state.fill_(torch.nan)  # planted
    passes.ran.clear()
    assert torch.equal(latents(scheduled, PROMPTS[1], seed=5, **shown), expected)
    assert [how for how, _ in passes.ran] == ["whole", "shallow", "shallow"] * 2
    assert scheduled.unet._kept is None
    with pytest.raises(InputError, match="UpscalePipeline does not say whether it guides: make a schedule that always"):
        schedule_pipeline(own, make_schedule(2, 6, guidance_interval=(0, 0.5)))


def test_a_latent_upscaler_whose_times_are_no_schedulers_is_refused_in_one_line():
    own: Any = latent_upscaler()
    scheduled = schedule_pipeline(own, make_schedule(2, 6, deep_every=3))
    small = torch.randn(1, 4, 8, 8)
    with pytest.raises(InputError, match="which its scheduler does not list: no schedule can follow it"):
        latents(scheduled, PROMPTS[0], image=small)


def test_a_batch_that_changes_within_a_picture_runs_whole(pipeline):
    scheduled, passes = watched(pipeline, EVERY_3RD)

    def drop_guidance(pipe: Any, at: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        """As diffusers' documentation does it."""
        if at == 0:
            pipe._guidance_scale = 0.0
            kept["prompt_embeds"] = kept["prompt_embeds"].chunk(2)[-1]
        return kept

    tensors = {"callback_on_step_end": drop_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = latents(scheduled, *PROMPTS, **tensors)
    assert passes.ran[:3] == [("whole", 8), ("whole", 4), ("shallow", 4)] and bool(found.isfinite().all())
    # A schedule that knows the branches goes on with the prompt's.
    scheduled, passes = watched(pipeline, BOTH)
    latents(scheduled, *PROMPTS, **tensors)
    assert passes.ran[:3] == [("whole", 8), ("shallow", 4), ("shallow", 4)]


def test_a_call_outside_of_a_pipeline_is_the_plain_models(pipeline):
    scheduled = schedule_pipeline(pipeline, BOTH)
    latents(scheduled, PROMPTS[0], callback_on_step_end=_stop_after(0))
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 801, "encoder_hidden_states": torch.randn(2, 5, 32)}
    with torch.no_grad():
        assert torch.equal(scheduled.unet(**call).sample, pipeline.unet(**call).sample)


def test_what_the_denoiser_has_is_reached_through_it(pipeline, tmp_path):
    source = copy.deepcopy(pipeline)
    scheduled = schedule_pipeline(source, BOTH)
    assert scheduled.unet.config is source.unet.config and scheduled.unet.dtype == torch.float32
    before = latents(scheduled, PROMPTS[0])
    scheduled.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert not torch.equal(latents(scheduled, PROMPTS[0]), before)
    assert not isinstance(source.unet, Scheduled)
    scheduled.save_pretrained(tmp_path)  # the model, and the schedule beside it
    assert Schedule.load(tmp_path) == BOTH
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(opened.unet.conv_in.weight, source.unet.conv_in.weight)


def test_what_no_schedule_can_follow_is_refused_in_one_line(pipeline):
    parts = {k: v for k, v in tiny_pipeline().components.items() if k != "image_encoder"}
    pag = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(InputError, match="how StableDiffusionPAGPipeline arranges its branches"):
        schedule_pipeline(pag, BOTH)
    schedule_pipeline(pag, EVERY_3RD)
    with pytest.raises(InputError, match="the schedule is for a UNet of 4 levels, and this one has 3"):
        schedule_pipeline(pipeline, make_schedule(4, 6, deep_every=2))
    with pytest.raises(InputError, match="UNet2DModel has no up_blocks.1"):
        without: Any = unconditional()
        levels = len(without.unet.config["up_block_types"])
        schedule_pipeline(without, make_schedule(levels, 6, deep_every=2, depth="up_blocks.1"))
    with pytest.raises(InputError, match="has a schedule already"):
        schedule_pipeline(schedule_pipeline(pipeline, BOTH), BOTH)
    with pytest.raises(InputError, match="slim the one that the schedule was given to"):
        compress(schedule_pipeline(pipeline, BOTH), PROMPTS, "4%")
    changed = copy.deepcopy(pipeline)
    changed.unet.forward = changed.unet.forward
    with pytest.raises(InputError, match="forward was replaced"):
        schedule_pipeline(changed, BOTH)
    lost = schedule_pipeline(pipeline, BOTH)
    lost.scheduler = copy.deepcopy(pipeline.scheduler)
    listed = type(lost.scheduler).set_timesteps

    def other_times(*args: Any, **kwargs: Any) -> None:
        listed(lost.scheduler, *args, **kwargs)
        times = lost.scheduler.timesteps
        lost.scheduler.timesteps = _Shifted(times)

    lost.scheduler.set_timesteps = other_times
    with pytest.raises(InputError, match="which its scheduler does not list: no schedule can follow it"):
        latents(lost, PROMPTS[0])


class _Shifted(torch.Tensor):
    """Times that a pipeline goes through, and says others."""

    def __iter__(self):
        return iter(self.as_subclass(torch.Tensor) + 1)

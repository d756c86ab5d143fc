"""Calling pipelines of every kind: what is handed over, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from families import FAMILIES
from families.family import SAMPLING, TWO_LEVELS
from families.images import unconditional
from families.transformers import dit
from families.videos import image_to_video
from pydantic import ValidationError
from torch import nn

from exporters.graphs.pipeline import example_call
from slimdiff import CalibrationSettings, InputError, Sampling, calibrate
from slimdiff.denoising.trajectory import (
    Call,
    map_tensors,
    predict,
    record_calls,
    sample_images,
    time_name,
    time_of,
    watch_calls,
)


class Recorder(DiffusionPipeline):
    """A pipeline that only remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.register_to_config()
        self.unet = nn.Identity()
        self.seen: list[dict[str, Any]] = []

    def __call__(
        self, prompt=None, image=None, strength=0.5, height=None, width=None, generator=None, num_inference_steps=50
    ):
        self.seen.append({"prompt": prompt, "image": image, "strength": strength, "height": height})
        return ([f"image of {p}" for p in prompt],)


def test_what_differs_is_batched_and_what_does_not_is_handed_on():
    pipeline = Recorder()
    pictures = [torch.full((3, 4, 4), float(i)) for i in range(3)]
    inputs = [{"prompt": str(i), "image": picture} for i, picture in enumerate(pictures)]
    sampling = Sampling(batch=2, height=8, arguments={"strength": 1.0})
    assert sample_images(pipeline, inputs, sampling) == ["image of 0", "image of 1", "image of 2"]
    assert [call["prompt"] for call in pipeline.seen] == [["0", "1"], ["2"]]
    assert [tuple(call["image"].shape) for call in pipeline.seen] == [(2, 3, 4, 4), (1, 3, 4, 4)]
    assert all(call["strength"] == 1.0 and call["height"] == 8 for call in pipeline.seen)


def test_what_a_pipeline_does_not_take_or_lacks_is_named():
    with pytest.raises(InputError, match="DiTPipeline takes no prompt and needs class_labels: give each image's"):
        sample_images(dit(), ["a red barn"], SAMPLING)
    with pytest.raises(InputError, match="StableVideoDiffusionPipeline needs image"):
        sample_images(image_to_video(), [{}], SAMPLING)
    with pytest.raises(InputError, match="DDIMPipeline takes no height, strength"):
        sampling = SAMPLING.model_copy(update={"height": 8, "arguments": {"strength": 1}})
        sample_images(unconditional(), [{}], sampling)
    with pytest.raises(InputError, match="different arguments"):
        sample_images(Recorder(), ["a", {"image": 1}], SAMPLING)
    with pytest.raises(ValidationError, match="arguments"):
        Sampling(arguments={"image": torch.zeros(1)})


def test_a_pipeline_of_no_inputs_makes_as_many_images_as_are_asked_for():
    images = sample_images(unconditional(), [{}, {}, {}], SAMPLING)
    assert [image.size for image in images] == [(8, 8)] * 3


def test_continuous_times_are_recorded_as_they_are():
    family = FAMILIES["image-to-video"]
    calls = record_calls(image_to_video(), family.inputs[:1], family.sampling)
    expected = [math.log(sigma) / 4 for sigma in (700.0, 0.002)]
    assert [call.timestep for call in calls] == pytest.approx(expected, rel=1e-5)
    assert all(float(call.arguments["timestep"]) == call.timestep for call in calls)
    assert [call.step for call in calls] == [0, 1]


def test_no_mapping_is_taken_for_a_blank_prompt():
    settings = CalibrationSettings(samples=2, sampling=SAMPLING)
    assert calibrate(unconditional(), [{}, {}], settings).made_from["prompts"] == 2
    with pytest.raises(InputError, match="is empty"):
        calibrate(unconditional(), [" "], settings)


def test_a_calls_tensors_are_cast_wherever_they_are():
    nest = {"residuals": (torch.ones(2), [torch.zeros(1)]), "ids": torch.tensor([1]), "scale": 2.0, "none": None}
    moved = Call(0, 1, nest).to("cpu", torch.float16)
    assert [t.dtype for t in (moved["residuals"][0], moved["residuals"][1][0])] == [torch.float16] * 2
    assert moved["ids"].dtype == torch.int64 and moved["scale"] == 2.0 and moved["none"] is None
    doubled = map_tensors(lambda t: t * 2, nest)
    assert type(doubled["residuals"]) is tuple and float(doubled["residuals"][0].sum()) == 4


def test_a_model_of_another_dtype_gets_the_call_in_its_own_and_the_time_as_it_was():
    """bf16 takes 999 for 1000, and 1.0955 for 1.0938."""
    arguments = {"sample": torch.ones(1), "timestep": torch.tensor(999.0), "rope": torch.ones(2, dtype=torch.float64)}
    recorded = Call(0, 999, arguments, torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        cast = recorded.to("cpu", dtype)
        assert cast["sample"].dtype == dtype and cast["rope"].dtype == torch.float64
        assert cast["timestep"].dtype == torch.float32 and float(cast["timestep"]) == 999
    assert Call(0, 999, arguments).to("cpu", torch.float16)["rope"].dtype == torch.float16


def test_a_models_own_call_is_not_cast():
    """A model in half precision is recorded in float32, and a half model's call is cast but for its time."""
    pipeline = tiny_pipeline(**TWO_LEVELS).to(torch.bfloat16)
    pipeline.scheduler = EulerDiscreteScheduler()
    calls = record_calls(pipeline, ["a red barn"], SAMPLING.model_copy(update={"steps": 3}))
    assert [call.timestep for call in calls] == [999, 499.5, 0]
    tensors = [call.arguments[name] for call in calls for name in ("sample", "timestep")]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    cast = calls[0].to("cpu", torch.bfloat16)
    assert cast["sample"].dtype == torch.bfloat16 and cast["timestep"].dtype == torch.float32
    wide = tiny_pipeline(**TWO_LEVELS).to(torch.bfloat16).unet.float()
    assert all(predict(pipeline.unet, call).isfinite().all() for call in calls)
    assert all((predict(wide, c) - predict(pipeline.unet, c)).norm() < 0.1 * predict(wide, c).norm() for c in calls)


def test_each_batch_is_a_trajectory_of_its_own_also_where_times_rise():
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    sampling = SAMPLING.model_copy(update={"batch": 1, "steps": 3})
    calls = record_calls(pipeline, ["a", "b"], sampling)
    assert [call.step for call in calls] == [0, 1, 2] * 2 and calls[0].timestep < calls[1].timestep
    assert [call.step for call in record_calls(pipeline, ["a", "b"], sampling, every=2, staggered=True)] == [0, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "name", "time"),
    [
        ({"sample": 0, "timestep": torch.tensor(1.5), "timestep_cond": None}, "timestep", 1.5),
        ({"hidden_states": 0, "timesteps": torch.tensor([3, 3])}, "timesteps", 3),
        ({"x": [], "t": torch.tensor([0.25])}, "t", 0.25),
        ({"sample": 0, "timestep_ratio": 1, "added_time_ids": 2}, "timestep_ratio", 1),
        ({"sample": 0, "timestep": 981}, "timestep", 981),
    ],
)
def test_the_time_of_every_denoiser_is_found(arguments, name, time):
    assert time_name(arguments) == name and time_of(arguments) == time


def test_a_denoiser_without_a_time_is_refused():
    with pytest.raises(InputError, match="called at a time, and this one was given sample, added_time_ids"):
        time_of({"sample": torch.ones(1), "added_time_ids": torch.ones(1)})


def test_what_a_scheduler_raises_is_one_line_and_what_our_hooks_raise_is_not_disguised():
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.scheduler = PNDMScheduler()  # its Runge-Kutta steps take four or more
    refused = r"^StableDiffusionPipeline with PNDMScheduler does not run in 2 steps: ValueError: .*\(4,\) \(8,\) .*$"
    with pytest.raises(InputError, match=refused):
        record_calls(pipeline, ["a"], SAMPLING)
    assert example_call(pipeline).arguments["sample"].shape == (2, 4, 8, 8)
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ZeroDivisionError), watch_calls(pipeline.unet, lambda _: 1 / 0):
        sample_images(pipeline, ["a"], SAMPLING)
    without = SAMPLING.model_copy(update={"steps": 3, "arguments": {"timesteps": []}})
    with pytest.raises(InputError, match="StableDiffusionPipeline with DDIMScheduler does not"):
        record_calls(pipeline, ["a"], without)


def test_what_a_call_gives_for_a_default_or_beyond_the_signature_is_recorded():
    class Denoiser(nn.Module):
        def forward(self, sample, timestep, scale=None, **rest):
            return sample

    seen = []
    with watch_calls(denoiser := Denoiser(), seen.append):
        denoiser(None, 1, scale=None, fps=2, mask=None)
    assert seen == [{"sample": None, "timestep": 1, "fps": 2}]

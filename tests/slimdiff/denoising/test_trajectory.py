"""Calling pipelines of every kind: what is handed over, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from families import FAMILIES
from families.family import SAMPLING
from families.images import unconditional
from families.transformers import dit
from families.videos import image_to_video
from pydantic import ValidationError
from torch import nn

from slimdiff import CalibrationSettings, InputError, Sampling, calibrate
from slimdiff.denoising.trajectory import Call, map_tensors, record_calls, sample_images


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

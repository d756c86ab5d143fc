"""optimum opens the folders that we write and makes the images that torch makes; `make test-optimum` runs this.

optimum has an environment of its own, and where it is missing nothing is skipped: these tests fail.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from image_checks import images, same

from benchmarks.full_size_export import measure
from exporters.graphs.export import export_unet
from exporters.graphs.pipeline import example_call, export_pipeline
from exporters.settings import ExportSettings
from slimdiff.groups import find_sites
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.slimming.skeleton import skeleton

pytestmark = pytest.mark.optimum


def load(folder):
    from optimum.onnxruntime import ORTDiffusionPipeline

    return ORTDiffusionPipeline.from_pretrained(folder)


def test_it_makes_the_same_images(onnx_folder, pipeline):
    for options in ({}, {"num_images_per_prompt": 2}):
        same(images(load(onnx_folder), ["abc", "de"], **options), images(pipeline, ["abc", "de"], **options))


def test_it_makes_the_same_images_of_any_size_from_a_slim_pipeline_of_open_size(open_folder, slim_pipeline):
    for size in ({"height": 16, "width": 16}, {"height": 24, "width": 40}):
        same(images(load(open_folder), ["abc"], **size), images(slim_pipeline, ["abc"], **size))


def test_it_makes_the_same_images_at_times_that_are_not_whole(pipeline, tmp_path, monkeypatch):
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    export_pipeline(pipeline, tmp_path, ExportSettings(dynamic_batch=True))
    same(images(load(tmp_path), ["abc"]), images(pipeline, ["abc"]))


def test_it_makes_the_same_sdxl_images(onnx_xl_folder, xl_pipeline):
    same(images(load(onnx_xl_folder), ["abc"]), images(xl_pipeline, ["abc"]))


def test_it_makes_the_same_images_from_a_slim_sdxl(onnx_xl_folder, xl_pipeline, tmp_path):
    halves = {site.path: site.dense_rank // 2 for site in find_sites(xl_pipeline.unet)[0]}
    slim = type(xl_pipeline)(**{**xl_pipeline.components, "unet": skeleton(xl_pipeline.unet, halves)})
    shutil.copytree(onnx_xl_folder, tmp_path / "slim")
    export_unet(slim.unet, tmp_path / "slim" / "unet", example_call(slim), ExportSettings(dynamic_batch=True))
    same(images(load(tmp_path / "slim"), ["abc"]), images(slim, ["abc"]))


def test_it_makes_the_same_image_from_the_embedded_model(tmp_path):
    demo = load_pipeline("demo")
    export_pipeline(demo, tmp_path, ExportSettings(dynamic_batch=True))
    size = demo.unet.config.sample_size * demo.vae_scale_factor
    wanted = {"prompts": ["a large red circle top left, on a gray background"], "height": size, "width": size}
    same(images(load(tmp_path), **wanted), images(demo, **wanted))


def test_the_export_benchmark_measures_its_image(tmp_path):
    row = measure("tiny", "slim", ExportSettings(), tmp_path, torch.float32, steps=2)
    assert row["psnr"] >= 80 and row["image"] == [16, 16, 3]  # twice the bar: untrained models hide faults

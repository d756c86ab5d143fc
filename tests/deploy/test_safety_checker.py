"""A safety checker goes with what is exported, or is left out when that is said; figures are of images before it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command_line import call, refused
from conftest import PROMPTS, tiny_pipeline
from every_pipeline.components import make_component
from families.family import SAMPLING, TWO_LEVELS
from PIL import Image

from exporters import export_pipeline
from exporters.layout import FOLDERS, SAFETY_CHECKER
from slimdiff import Budget, CalibrationSettings, PlanSettings, compress
from slimdiff.fidelity import compare
from slimdiff.storage.manifest import MANIFEST

STEPS = ["--steps", 2, "--guidance", 3]


def guarded(threshold: float):
    """The tiny pipeline with a checker that flags images whose likeness to a concept is above the threshold."""
    pipeline = tiny_pipeline(**TWO_LEVELS)
    checker = make_component("StableDiffusionSafetyChecker")
    checker.special_care_embeds_weights.fill_(1.0)
    checker.concept_embeds_weights.fill_(threshold)
    pipeline.register_modules(safety_checker=checker, feature_extractor=make_component("CLIPImageProcessor"))
    pipeline.register_to_config(requires_safety_checker=True)
    return pipeline


def pixels(file) -> np.ndarray:
    return np.asarray(Image.open(file), dtype=int)


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A model all of whose images are blackened."""
    folder = tmp_path_factory.mktemp("strict") / "model"
    guarded(-1.0).save_pretrained(folder)
    return folder


def test_an_exported_pipeline_blackens_what_torch_blackens(strict, tmp_path, capsys):
    onnx, lenient, bundle = tmp_path / "onnx", tmp_path / "lenient", tmp_path / "bundle"
    guarded(1.0).save_pretrained(lenient)
    call(["export", strict, "--out", onnx], capsys)
    call(["bundle", onnx, "--target", "edge", "--runtime", "onnxruntime", "--out", bundle], capsys)
    shutil.copytree(onnx, tmp_path / "lenient-onnx")  # all but the checker is the same
    (tmp_path / "lenient-onnx" / MANIFEST).unlink()
    export_pipeline(guarded(1.0), tmp_path / "lenient-onnx", without={*FOLDERS} - {SAFETY_CHECKER})
    blackened = {strict: True, onnx: True, bundle: True, lenient: False, tmp_path / "lenient-onnx": False}
    for artifact, black in blackened.items():
        call(["generate", artifact, "--prompt", PROMPTS[0], "--out", tmp_path / "image.png", *STEPS], capsys)
        assert (pixels(tmp_path / "image.png") == 0).all() == black, artifact


@pytest.mark.slow
def test_it_is_left_out_when_that_is_said(strict, tmp_path, capsys):
    onnx = tmp_path / "onnx"
    call(["export", strict, "--out", onnx, "--no-safety-checker"], capsys)
    index = json.loads((onnx / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None] and index["requires_safety_checker"] is False
    call(["generate", onnx, "--prompt", PROMPTS[0], "--out", tmp_path / "image.png", *STEPS], capsys)
    assert (pixels(tmp_path / "image.png") > 0).any()


def test_images_are_compared_before_the_checker():
    pipeline = guarded(-1.0)
    settings = CalibrationSettings(samples=2, sampling=SAMPLING)
    plan = PlanSettings(align=4, allocation="uniform")
    slim = compress(pipeline, PROMPTS[:2], Budget("20%"), calibration=settings, planning=plan).pipeline
    images = compare(pipeline, slim, PROMPTS[2:4], SAMPLING, images=2)["images"]
    assert np.isfinite(images["psnr_db"]) and images["ssim"] < 1
    assert pipeline.safety_checker is not None and slim.safety_checker is not None
    assert (np.asarray(pipeline(PROMPTS[0], num_inference_steps=1, height=16, width=16).images[0]) == 0).all()


def test_a_component_that_an_export_does_not_carry_is_refused(tmp_path, capsys):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.register_modules(image_encoder=make_component("CLIPVisionModelWithProjection"))
    pipeline.save_pretrained(tmp_path / "model")
    assert "image_encoder" in refused(["export", tmp_path / "model", "--out", tmp_path / "onnx"], capsys)
    assert not (tmp_path / "onnx").exists()

"""Measures of closeness: exact where the answer is known."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import PROMPTS, SAMPLING
from PIL import Image

from slimdiff import InputError, compare
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import SlimdiffError
from slimdiff.fidelity import image_fidelity, noise_error, psnr_db, ssim


def test_pipelines_are_compared_on_the_dense_ones_trajectories(pipeline, compression):
    value = compare(pipeline, compression.pipeline, PROMPTS, SAMPLING, images=1, quality=lambda a, b: {"n": len(a + b)})
    assert value["noise_error"]["relative_mse"] > 0 and len(value["noise_error"]["by_timestep"]) == SAMPLING.steps
    assert value["images"]["count"] == 1 and value["quality"] == {"n": 2} and value["sampling"]["steps"] == 4
    same = compare(pipeline, pipeline, PROMPTS[:1], SAMPLING, trajectories=1)
    assert same["noise_error"]["relative_mse"] == 0 and same["images"]["psnr_db"] == float("inf")
    unsteady, drift = copy.deepcopy(pipeline), itertools.count()
    unsteady.unet.register_forward_hook(lambda _m, _a, output: tuple(o + next(drift) for o in output))
    with pytest.raises(SlimdiffError, match="does not reproduce itself"):
        compare(unsteady, pipeline, PROMPTS[:1], SAMPLING)


def test_a_pipeline_that_changes_its_denoiser_for_the_length_of_a_call_is_not_compared(fresh_pipeline):
    """The model as it stands is another than the one that was recorded."""

    class Changing(type(fresh_pipeline)):
        def __call__(self, *args, **options):
            with self.unet.conv_out.register_forward_hook(lambda _m, _a, output: 1.1 * output):
                return super().__call__(*args, **options)

    changing = Changing(**fresh_pipeline.components, requires_safety_checker=False)
    with pytest.raises(SlimdiffError, match="does not reproduce itself on its first recorded call"):
        compare(changing, fresh_pipeline, PROMPTS[:1], SAMPLING)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_psnr_and_ssim_of_known_pairs():
    a = noise(0)
    assert psnr_db(a, a) == float("inf") and ssim(a, a) == pytest.approx(1)
    assert psnr_db(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)) == pytest.approx(0)
    assert abs(ssim(a, noise(1))) < 0.2
    slightly = np.clip(a.astype(int) + 1, 0, 255).astype(np.uint8)
    assert psnr_db(a, slightly) == pytest.approx(48.13, abs=0.1)


def test_images_are_compared_pairwise():
    a, b = Image.fromarray(noise(0)), Image.fromarray(noise(1))
    assert image_fidelity([a, b], [a, b])["psnr_db"] == float("inf")
    assert image_fidelity([a, b], [a, a])["psnr_db"] < 15
    with pytest.raises(InputError, match="differ"):
        image_fidelity([a, b], [a])


def test_noise_error_is_the_ratio_of_energies():
    calls = [Call(0, 900, {"x": torch.ones(2, 3)}), Call(1, 100, {"x": 3 * torch.ones(2, 3)})]
    result = noise_error(lambda c: c.arguments["x"], lambda c: c.arguments["x"] + 1.0, calls)
    assert result["relative_mse"] == pytest.approx(12 / 60)
    assert result["by_timestep"] == [[900, pytest.approx(1.0)], [100, pytest.approx(1 / 9)]]

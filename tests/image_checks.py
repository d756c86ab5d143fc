"""Images of a pipeline, and how near two of them are."""

from __future__ import annotations

import numpy as np
import torch


def images(pipeline, prompts, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts) * options.get("num_images_per_prompt", 1))]
    options = {"height": 8 * pipeline.vae_scale_factor, "width": 8 * pipeline.vae_scale_factor} | options
    return pipeline(
        prompts, num_inference_steps=2, guidance_scale=4.0, generator=seeds, output_type="np", **options
    ).images


def same(found: np.ndarray, expected: np.ndarray, least: float = 80.0) -> None:
    """PSNR between images in [0, 1], in dB: twice what is asked of trained models, for untrained ones hide faults."""
    assert found.shape == expected.shape and np.ptp(expected) > 0.1
    assert -10 * np.log10(np.square(found - expected).mean() + 1e-20) >= least

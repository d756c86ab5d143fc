"""Weights of timesteps: of the true time, or refused where a scheduler does not say how noisy one is."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from slimdiff import InputError
from slimdiff.calibration.weighting import timestep_weigher


def test_timestep_weights_are_of_the_true_time():
    plain, inverse = DDIMScheduler(), timestep_weigher("inverse_snr", DDIMScheduler())
    ratio = plain.alphas_cumprod.double() / (1 - plain.alphas_cumprod.double())
    expected = (1 / ratio) / (1 / ratio).mean()
    assert [inverse(t) for t in (0, 500, 999)] == pytest.approx(expected[[0, 500, 999]].tolist())
    assert inverse(500.5) == pytest.approx(float(expected[500:502].mean()))
    for time in (-1.5, 1001.0):
        with pytest.raises(InputError, match="timesteps from 0 to 999, and the denoiser was called at"):
            inverse(time)


@pytest.mark.parametrize(
    ("kind", "scheduler", "refused"),
    [
        ("min_snr", EDMEulerScheduler(), "EDMEulerScheduler's are not: use uniform"),
        ("min_snr", EulerDiscreteScheduler(timestep_type="continuous"), "EulerDiscreteScheduler's are not"),
        ("min_snr", UniPCMultistepScheduler(use_flow_sigmas=True), "UniPCMultistepScheduler's are not"),
        ("inverse_snr", DDIMScheduler(rescale_betas_zero_snr=True), "least SNR of DDIMScheduler is 1e-12"),
        ("inverse_snr", DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "use min_snr or uniform"),
    ],
)
def test_timestep_weights_that_a_scheduler_does_not_give_are_refused(kind, scheduler, refused):
    with pytest.raises(InputError, match=refused):
        timestep_weigher(kind, scheduler)

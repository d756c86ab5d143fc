"""torch's state is the caller's: the same bits under any of it, and it stays as it was."""

from __future__ import annotations

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from families.caller_states import CALLER_STATES, seen_from_outside
from families.family import SAMPLING, TWO_LEVELS

from slimdiff import Budget, CalibrationSettings, PlanSettings, compress, load_pipeline
from slimdiff.fidelity import compare

SETTINGS = CalibrationSettings(samples=2, sampling=SAMPLING)
PLANNING = PlanSettings(align=4, sensitivity_calls=2)
QUICK = {"autocast to bfloat16", "default dtype float64", "inference mode", "attention by plain products"}


def outcome(pipeline):
    slim = compress(pipeline, PROMPTS[:2], Budget("8%"), calibration=SETTINGS, planning=PLANNING)
    fidelity = compare(pipeline, slim.pipeline, PROMPTS[2:3], SAMPLING, images=1)
    return slim, fidelity


@pytest.fixture(scope="module")
def usual():
    return outcome(tiny_pipeline(**TWO_LEVELS))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLER_STATES]
)
def test_the_same_bits_whatever_state_the_caller_is_in(name, usual):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    with CALLER_STATES[name]():
        before, noise = seen_from_outside(), torch.get_rng_state()
        slim, fidelity = outcome(pipeline)
        assert seen_from_outside() == before and torch.equal(torch.get_rng_state(), noise)
    assert slim.plan == usual[0].plan
    assert fidelity == usual[1]
    expected = usual[0].pipeline.unet.state_dict()
    for key, weight in slim.pipeline.unet.state_dict().items():
        assert weight.dtype == expected[key].dtype and torch.equal(weight, expected[key]), key
        assert not weight.is_inference()


@pytest.mark.parametrize("name", ["default dtype float64", "autocast to bfloat16", "default device meta"])
def test_a_model_is_loaded_as_its_files_are(name, tmp_path):
    pipeline = tiny_pipeline(**TWO_LEVELS)
    pipeline.save_pretrained(tmp_path)
    with CALLER_STATES[name]():
        loaded = load_pipeline(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipeline, part).state_dict()
        for key, weight in getattr(loaded, part).state_dict().items():
            assert weight.dtype == expected[key].dtype and torch.equal(weight, expected[key]), key

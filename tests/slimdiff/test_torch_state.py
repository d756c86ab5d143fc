"""torch's state is the caller's: the same bits under any of it, and it stays as it was."""

from __future__ import annotations

import os

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from families.caller_states import ASKED_FOR, CALLER_STATES, seen_from_outside
from families.family import SAMPLING, TWO_LEVELS

from exporters.runtimes import torch_model
from slimdiff import Budget, CalibrationSettings, PlanSettings, compress, load_pipeline
from slimdiff.denoising.torch_state import on_threads, own_threads, own_torch_state
from slimdiff.fidelity import compare

SETTINGS = CalibrationSettings(samples=2, sampling=SAMPLING)
PLANNING = PlanSettings(align=4, sensitivity_calls=2)
QUICK = {
    "another number of threads",
    "attention by plain products",
    "autocast to bfloat16",
    "default dtype float64",
    "inference mode",
    "TF32 everywhere",
}


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


@pytest.mark.parametrize("name", CALLER_STATES)
def test_inside_torch_computes_as_it_starts_and_outside_it_is_as_it_was(name):
    def inside():
        with own_torch_state():
            return {key: value for key, value in seen_from_outside().items() if key not in ASKED_FOR}

    expected = inside()
    assert expected["products"] == "highest" and not expected["cudnn.allow_tf32"] and not expected["gradients"]
    with CALLER_STATES[name]():
        before = seen_from_outside()
        assert inside() == expected
        assert seen_from_outside() == before


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


def test_threads_are_the_processs_own_or_those_asked_for(monkeypatch):
    now = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    with own_torch_state():
        assert torch.get_num_threads() == 3
    with on_threads(2), own_torch_state():
        assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= own_threads() <= (os.cpu_count() or 1) and torch.get_num_threads() == now


def test_a_timed_model_runs_on_the_threads_asked_for(tmp_path, monkeypatch):
    tiny_pipeline(**TWO_LEVELS).save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(torch_model, "predict", own_torch_state()(lambda *_: seen.append(torch.get_num_threads())))
    for threads in (1, 2, 3):
        torch_model.TorchModel(tmp_path, threads).run()
    assert seen == [1, 2, 3]


def test_a_block_inside_keeps_what_was_set_between():
    with own_torch_state(), torch.autocast("cpu", torch.bfloat16), own_torch_state():
        assert torch.is_autocast_enabled("cpu")

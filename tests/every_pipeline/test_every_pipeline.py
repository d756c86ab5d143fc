"""The list that every pipeline of diffusers goes through: it is slimmed right, or refused in one line.

A pipeline is on it as soon as diffusers has it. Of most, a tiny random member is made by what their constructors ask
for; the others are seen by the commands alone, which look at the classes that a directory names.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families.caller_states import CALLER_STATES

from every_pipeline.members import CannotBeMadeError, inputs_of, make_member, pipeline_names, sampling_of
from slimdiff import Budget, CalibrationSettings, PlanSettings, SlimdiffError, compress, load_pipeline
from slimdiff.denoising.trajectory import denoiser_name, predict, record_calls
from slimdiff.slimming.slim import slim_denoiser

# What must be done: a fault that refuses them would pass for a refusal.
DONE = {
    "AnimateDiffPipeline",
    "DDIMPipeline",
    "DiTPipeline",
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "LatentConsistencyModelPipeline",
    "PixArtSigmaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableVideoDiffusionPipeline",
}
# One of each kind runs in `make test`, all in `make test-slow`.
QUICK = {
    "DDIMPipeline",
    "FluxPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
}


def slowly(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


EVERY = [name if name in QUICK else slowly(name) for name in pipeline_names()]


def is_one_line(error: BaseException) -> bool:
    return isinstance(error, SlimdiffError) and len(str(error)) > 20 and "\n" not in str(error)


def made(name: str) -> Any:
    try:
        return make_member(name)
    except CannotBeMadeError as error:
        assert name not in DONE, error
        pytest.skip(str(error))


@pytest.mark.parametrize("name", EVERY)
def test_a_pipeline_is_slimmed_right_or_refused_in_one_line(name, tmp_path):
    pipeline = made(name)
    parts = {part: state_of(module) for part, module in pipeline.components.items()}
    inputs, sampling = inputs_of(pipeline), sampling_of(pipeline)
    calibration = CalibrationSettings(samples=2, sampling=sampling)
    try:
        slim = compress(pipeline, inputs, Budget("2%"), calibration=calibration, planning=PlanSettings(align=4))
    except Exception as error:
        assert name not in DONE, error
        assert is_one_line(error), error
        assert_same(parts, pipeline)
        return
    assert_same(parts, pipeline)
    reproduces_itself(pipeline, inputs, sampling)
    full_rank_is_dense(pipeline, slim, inputs, sampling)
    slim.pipeline.save_pretrained(tmp_path)
    try:
        loaded = load_pipeline(tmp_path)
    except SlimdiffError as error:  # diffusers names schedulers that it has laid aside so that nothing finds them
        assert name not in DONE and is_one_line(error), error
        return
    own = denoiser_name(pipeline)
    assert_same({part: state for part, state in parts.items() if part != own}, loaded)
    assert_same({own: state_of(slim.pipeline.components[own])}, loaded)
    assert type(loaded) is type(pipeline)


STATES = ("autocast to bfloat16", "default dtype float64", "another number of threads")


@pytest.mark.parametrize(
    "name", [name if name in ("StableDiffusionPipeline", "FluxPipeline") else slowly(name) for name in pipeline_names()]
)
def test_a_pipeline_gives_the_same_bits_whatever_state_the_caller_is_in(name):
    def slim() -> Any:
        pipeline = made(name)
        calibration = CalibrationSettings(samples=2, sampling=sampling_of(pipeline))
        inputs = inputs_of(pipeline)
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(CALLER_STATES[state]())
            return compress(pipeline, inputs, Budget("2%"), calibration=calibration, planning=PlanSettings(align=4))

    states: tuple[str, ...] = ()
    try:
        usual = slim()
    except SlimdiffError as error:
        pytest.skip(str(error))
    states = STATES
    other = slim()
    assert other.plan == usual.plan
    own = denoiser_name(usual.pipeline)
    assert_same({own: state_of(usual.pipeline.components[own])}, other.pipeline)


def state_of(part: Any) -> Any:
    """What must not change of a component: its tensors with their dtypes, or its configuration."""
    if isinstance(part, torch.nn.Module):
        return {name: tensor.clone() for name, tensor in part.state_dict().items()}
    return type(part).__name__ if part is None or not hasattr(part, "config") else dict(part.config)


def assert_same(parts: dict[str, Any], pipeline: Any) -> None:
    """Every component is there, to the bit."""
    assert set(parts) <= set(pipeline.components)
    for name, before in parts.items():
        after = state_of(pipeline.components[name])
        if not isinstance(pipeline.components[name], torch.nn.Module):
            continue
        assert before.keys() == after.keys(), name
        for key, tensor in before.items():
            assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), (name, key)


def reproduces_itself(pipeline: Any, inputs: Any, sampling: Any) -> None:
    """The dense model errs by exactly nothing on its own record."""
    denoiser, outputs = getattr(pipeline, denoiser_name(pipeline)), []
    with denoiser.register_forward_hook(lambda _module, _args, output: outputs.append(output[0].detach().clone())):
        calls = record_calls(pipeline, inputs, sampling)
    assert len(calls) == len(outputs)
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(predict(denoiser, call), output.float())


def full_rank_is_dense(pipeline: Any, slim: Any, inputs: Any, sampling: Any) -> None:
    """No cut, no difference."""
    denoiser, plan = getattr(pipeline, denoiser_name(pipeline)), slim.plan.model_copy(deep=True)
    for site in plan.sites.values():
        site.rank = site.dense_rank
    same = slim_denoiser(denoiser, slim.statistics, plan.recount())
    for call in record_calls(pipeline, inputs, sampling):
        torch.testing.assert_close(predict(same, call), predict(denoiser, call), atol=1e-4, rtol=1e-4)

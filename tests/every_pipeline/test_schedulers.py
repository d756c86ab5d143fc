"""Every scheduler of diffusers, in every mode: what the denoiser receives is recorded to the bit, and all goes on."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from conftest import PROMPTS, tiny_pipeline
from families.family import TWO_LEVELS
from families.schedulers import can_be_made, every_scheduler, modes_of, schedulers_of
from torch import Tensor

from exporters.graphs.pipeline import example_call
from exporters.graphs.timesteps import has_whole_times
from slimdiff import Budget, CalibrationSettings, InputError, PlanSettings, Sampling, compare, compress
from slimdiff.denoising.trajectory import map_tensors, predict, record_calls, sample_images

SAMPLING = Sampling(steps=4, batch=2, guidance=3.0, seed=1)
PLANNING = PlanSettings(groups=("feed_forward",), align=4, sensitivity_calls=3, fitting_calls=6)
# One of each kind: whole times and others, several calls a step, steps of its own, flows, and one that is refused.
QUICK = {
    "BlockRefinementScheduler",
    "CMStochasticIterativeScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
NAMES = [name for name, kind in every_scheduler().items() if can_be_made(kind, {})]
MODES = [(name, mode) for name, kind in every_scheduler().items() for mode in modes_of(kind)]


@pytest.fixture(scope="module")
def tiny():
    return tiny_pipeline(**TWO_LEVELS)


@pytest.fixture(scope="module")
def tiny_learned():
    """Its UNet predicts a variance too."""
    return tiny_pipeline(**TWO_LEVELS, out_channels=8)


@pytest.fixture(scope="module")
def accepted(tiny) -> dict[str, Any]:
    return schedulers_of(tiny, lambda: run(tiny))


@pytest.fixture(scope="module")
def graphs(tiny, tmp_path_factory) -> dict[str, Any]:
    """The UNet's graphs open in ONNX Runtime, by the dtype of their timestep."""
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
    from exporters.graphs.export import export_unet
    from exporters.runtimes.unet import UNet
    from exporters.settings import ExportSettings

    folder, call, open_batch = tmp_path_factory.mktemp("graphs"), example_call(tiny), ExportSettings(dynamic_batch=True)
    found = {}
    for name in ("EulerDiscreteScheduler", "DDIMScheduler"):
        scheduler = every_scheduler()[name]()
        unet = UNet.open(export_unet(tiny.unet, folder / name, call, open_batch, scheduler=scheduler), threads=1)
        found[unet.session.dtypes["timestep"]] = unet
    assert set(found) == {"float32", "int64"}
    return found


def run(pipeline) -> None:
    """A trajectory in diffusers alone."""
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    pipeline(PROMPTS[:2], num_inference_steps=SAMPLING.steps, guidance_scale=3.0, output_type="latent", generator=noise)


def received(pipeline) -> list[tuple[dict[str, Any], Tensor]]:
    """What the denoiser is called with, and what it answers, while images are made: copies, by name."""
    seen: list[tuple[dict[str, Any], Tensor]] = []
    forward = pipeline.unet.forward

    @functools.wraps(forward)
    def watched(sample, timestep, **arguments):
        given = {"sample": sample, "timestep": timestep, **{k: v for k, v in arguments.items() if v is not None}}
        kept = map_tensors(torch.clone, given)
        output = forward(sample, timestep, **arguments)
        seen.append((kept, output[0].clone()))
        return output

    pipeline.unet.forward = watched
    try:
        sample_images(pipeline, PROMPTS[:2], SAMPLING)
    finally:
        del pipeline.unet.forward
    return seen


def check_records(pipeline) -> list[Any]:
    """Recorded calls are what the denoiser received, and it errs by nothing on them."""
    expected, calls = received(pipeline), record_calls(pipeline, PROMPTS[:2], SAMPLING)
    assert len(calls) == len(expected) >= SAMPLING.steps and [call.step for call in calls] == [*range(len(calls))]
    for call, (arguments, output) in zip(calls, expected, strict=True):
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                own = call.arguments[name]
                assert own.dtype == value.dtype and own.shape == value.shape and torch.equal(own, value)
        assert call.timestep == float(arguments["timestep"])
        assert torch.equal(predict(pipeline.unet, call), output)
    return calls


def check_scheduler(pipeline, graphs) -> None:
    """From the record to the graph, if there is one, with the scheduler that the pipeline has."""
    calls = check_records(pipeline)
    calibration = CalibrationSettings(samples=2, sampling=SAMPLING)
    slim = compress(pipeline, PROMPTS[:2], Budget("4%"), calibration=calibration, planning=PLANNING).pipeline
    found = compare(pipeline, slim, PROMPTS[:2], SAMPLING, images=1)["noise_error"]
    assert [t for t, _ in found["by_timestep"]] == sorted({call.timestep for call in calls}, reverse=True)
    assert 0 < found["relative_mse"] < math.inf
    whole = has_whole_times(pipeline.scheduler) and isinstance(example_call(pipeline).timestep, int)
    if unet := graphs.get("int64" if whole else "float32"):
        for call in calls:
            torch.testing.assert_close(unet.predict(call), predict(pipeline.unet, call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_pipeline_with_any_scheduler_is_slimmed_compared_and_exported(name, tiny, accepted, graphs):
    own = tiny.scheduler
    try:
        tiny.scheduler = accepted[name] if name in accepted else every_scheduler()[name]()
        if name not in accepted:
            with pytest.raises(InputError, match=f"with {name} does not run in 4 steps: "):
                record_calls(tiny, PROMPTS[:2], SAMPLING)
        else:
            check_scheduler(tiny, graphs)
    finally:
        tiny.scheduler = own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), MODES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, *v.items()))
)
def test_every_mode_of_a_scheduler_works_or_is_refused_in_one_line(name, mode, tiny, tiny_learned, graphs):
    learned = str(mode.get("variance_type")).startswith("learned")
    source, kind = tiny_learned if learned else tiny, every_scheduler()[name]
    own = source.scheduler
    try:
        try:
            source.scheduler = kind.from_config(own.config, **mode)
        except ValueError:  # the pipeline's own configuration is none of its
            source.scheduler = kind(**mode)
        try:
            run(source)
        except Exception:
            refused = f"with {name} does not run in 4 steps: "
        else:
            finite = all(bool(arguments["sample"].isfinite().all()) for arguments, _ in received(source))
            refused = "" if finite else f"with {name} calls its denoiser on values that are not finite, at t="
        if refused:
            with pytest.raises(InputError, match=refused):
                record_calls(source, PROMPTS[:2], SAMPLING)
        else:
            check_scheduler(source, {} if learned else graphs)
    finally:
        source.scheduler = own

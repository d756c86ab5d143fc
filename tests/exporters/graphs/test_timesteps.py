"""A UNet's timestep in its graph: int64 or float32 as its scheduler asks, a scalar, or one per sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from exporters.graphs.export import export_unet, unet_inputs
from exporters.graphs.reading import inputs_of, read_graph
from exporters.graphs.timesteps import has_whole_times, timestep_per_sample
from exporters.runtimes.module import answer
from exporters.runtimes.ort_session import OnnxRuntimeSession
from exporters.runtimes.unet import UNet
from exporters.settings import ExportSettings
from exporters.validation.divergence import own_errors
from exporters.validation.fragments import OnnxFragments
from exporters.validation.graph import check_parity
from exporters.validation.overflow import first_not_finite
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError


@pytest.fixture(scope="module")
def fractions(dense, calls, tmp_path_factory) -> dict[str, Path]:
    """Graphs for a scheduler of fractions, by precision, open in the batch, of a call at a whole time."""
    settings = {name: ExportSettings(precision=name, dynamic_batch=True) for name in ("fp32", "fp16")}
    folder = tmp_path_factory.mktemp("fractions")
    return {n: export_unet(dense, folder / n, calls[0], s, scheduler=EDMEulerScheduler()) for n, s in settings.items()}


def at(call: Call, time: float) -> Call:
    return Call(call.step, time, {**call.arguments, "timestep": torch.tensor(time)})


@pytest.mark.parametrize(
    ("scheduler", "whole"),
    [
        (DDIMScheduler(), True),
        (PNDMScheduler(), True),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), True),  # it rounds them
        (EulerDiscreteScheduler(timestep_spacing="leading"), True),  # whole, though in float32
        (EulerDiscreteScheduler(timestep_spacing="trailing"), True),
        (EulerDiscreteScheduler(), False),  # an even grid: whole at 4 steps, not at 5
        (EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="leading"), False),
        (EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), False),
        (EDMEulerScheduler(), False),
        (CMStochasticIterativeScheduler(), False),
        (FlowMatchEulerDiscreteScheduler(), False),
    ],
)
def test_a_schedulers_own_timesteps_say_whether_they_are_whole(scheduler, whole):
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    assert has_whole_times(scheduler) == whole
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino-fp32"])
def test_a_graph_for_a_scheduler_of_fractions_computes_at_the_true_time(fractions, dense, calls, precision, runtime):
    unet = UNet.open(fractions[precision], runtime, threads=1)
    assert unet.session.dtypes["timestep"] == "float32" and unet.session.inputs["timestep"] == ()
    for time in (1.0955, -1.5537, 946.4, 999.0, 21):
        call = at(calls[0], time)
        found, expected = unet.predict(call), predict(dense, call)
        close = {"rtol": 1e-4, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(found, expected, **close)
        beside = predict(dense, at(calls[0], time + 0.5))
        assert (found - expected).norm() < 0.2 * (beside - expected).norm()


def test_a_call_at_a_fraction_makes_such_a_graph_by_itself(dense, calls, tmp_path):
    graph = inputs_of(read_graph(export_unet(dense, tmp_path, at(calls[0], 0.5))))
    assert graph["timestep"].dtype == "float32"
    whole = at(calls[0], 21.0)
    assert unet_inputs(Call(0, 21, whole.arguments))["timestep"].dtype == torch.int64


def test_parity_and_the_search_for_a_fault_are_at_the_true_time(fractions, dense, calls):
    chosen = [at(call, time) for call, time in zip(calls, (1.0955, 0.5686, -1.5537), strict=True)]
    for precision in ("fp32", "fp16"):
        result = check_parity(dense, fractions[precision], chosen, every_module=True)
        assert result["passed"]
        names = [c["tensor"] for c in result["checks"] if c["metric"] == "cosine"]
        assert names == [f"out_sample@t={time}" for time in (1.0955, 0.5686, -1.5537)]


def test_a_graph_of_whole_timesteps_refuses_fractions_wherever_it_is_run(exported, dense, calls):
    call = at(calls[0], 946.4)
    with pytest.raises(InputError, match="takes whole timesteps, and the scheduler gave 946.4: export the model again"):
        check_parity(dense, exported["dense"], [call])
    with pytest.raises(InputError, match="takes whole numbers for timestep, given was 946.4"):
        first_not_finite(OnnxFragments(exported["dense"]), call)
    problems = [error.problem for error in own_errors(OnnxFragments(exported["dense"]), dense, call)]
    assert any("takes whole numbers for timestep" in problem for problem in problems if problem)


def test_a_float_timestep_per_sample(fractions, calls, tmp_path):
    model = read_graph(fractions["fp32"])
    timestep_per_sample(model)
    ir.save(model, str(tmp_path / "model.onnx"))
    shutil.copy(fractions["fp32"].parent / "model.onnx.data", tmp_path)
    scalar, changed = OnnxRuntimeSession(fractions["fp32"]), OnnxRuntimeSession(tmp_path / "model.onnx")
    assert changed.dtypes["timestep"] == "float32" and changed.inputs["timestep"] == ("batch",)
    inputs = {k: v for k, v in calls[0].arguments.items() if k != "timestep"}
    one, other = (answer(scalar, {**inputs, "timestep": torch.tensor(t)})["out_sample"] for t in (0.5, 946.4))
    mixed = answer(changed, {**inputs, "timestep": torch.tensor([0.5, 946.4])})["out_sample"]
    torch.testing.assert_close(mixed, torch.stack([one[0], other[1]]))


@pytest.mark.parametrize("name", ["dense", "dense-open"])
def test_every_sample_is_at_its_own_timestep(exported, calls, tmp_path, name):
    model = read_graph(exported[name])
    timestep_per_sample(model)
    ir.save(model, str(tmp_path / "model.onnx"))
    shutil.copy(exported[name].parent / "model.onnx.data", tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=False)
    scalar, changed = OnnxRuntimeSession(exported[name]), OnnxRuntimeSession(tmp_path / "model.onnx")
    assert changed.inputs["timestep"] == changed.inputs["sample"][:1]

    inputs = {k: v for k, v in calls[0].arguments.items() if k != "timestep"}
    early, late = (answer(scalar, {**inputs, "timestep": torch.tensor(t)})["out_sample"] for t in (21, 981))
    torch.testing.assert_close(answer(changed, {**inputs, "timestep": torch.tensor([981, 981])})["out_sample"], late)
    mixed = answer(changed, {**inputs, "timestep": torch.tensor([21, 981])})["out_sample"]
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1]]))
    assert not torch.allclose(early[1], late[1], atol=1e-4)


def test_it_is_done_once(exported):
    model = read_graph(exported["dense-open"])
    timestep_per_sample(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    timestep_per_sample(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_graph_that_begins_otherwise_is_refused(exported):
    model = read_graph(exported["dense"])
    model.graph[0].op_type = "Flatten"
    with pytest.raises(InputError, match="does not begin by spreading its timestep"):
        timestep_per_sample(model)
    model.graph.inputs[0].name = "latent"
    with pytest.raises(InputError, match="no UNet: its inputs are latent, timestep"):
        timestep_per_sample(model)

"""A scheduled model as graphs: the same images as in torch, on one file of weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import PROMPTS

from slimdiff import Sampling, Schedule, schedule_pipeline
from slimdiff.denoising.schedulers import make_scheduler
from slimdiff.denoising.trajectory import record_calls, sample_images, with_denoiser
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.loading.steering import steer
from slimdiff.schedule import make_schedule
from slimdiff.settings import SteeringSettings

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

BOTH = make_schedule(2, 6, guidance_interval=(0, 0.5), deep_every=3)
SAMPLING = Sampling(steps=6, batch=2, guidance=3.0, seed=1)


@pytest.fixture(scope="module")
def graph(pipeline, tmp_path_factory) -> Path:
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled

    folder = tmp_path_factory.mktemp("graphs")
    return export_scheduled(pipeline.unet, folder, example_call(pipeline), BOTH, scheduler=pipeline.scheduler)[0]


def in_runtime(pipeline: Any, graph: Path, schedule: Schedule, runtime: str = "onnxruntime") -> Any:
    from exporters.runtimes.scheduled import schedule_graphs
    from exporters.runtimes.unet import UNet

    other = with_denoiser(pipeline, UNet.open(graph, runtime, threads=1))
    return schedule_graphs(other, schedule, graph, runtime, threads=1)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino-fp32"])
def test_a_scheduled_graph_makes_torchs_images(runtime, graph, pipeline):
    pytest.importorskip(runtime.partition("-")[0], reason=f"graphs run in {runtime}")
    expected = sample_images(schedule_pipeline(pipeline, BOTH), PROMPTS, SAMPLING)
    found = sample_images(in_runtime(pipeline, graph, BOTH, runtime), PROMPTS, SAMPLING)
    near = image_fidelity(expected, found)["psnr_db"]
    full = sample_images(pipeline, PROMPTS, SAMPLING)
    assert near > 60 and image_fidelity(full, found)["psnr_db"] < near - 5  # it is not the full schedule's


@pytest.fixture(scope="module")
def graph_of_any_time(pipeline, tmp_path_factory) -> Path:
    """For a scheduler whose times are no whole numbers."""
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled

    scheduler = make_scheduler(pipeline.scheduler, "heun")
    folder = tmp_path_factory.mktemp("any-time")
    return export_scheduled(pipeline.unet, folder, example_call(pipeline), BOTH, scheduler=scheduler)[0]


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_a", "lcm", "euler_a", "pndm"])
def test_a_sampler_is_followed_in_a_runtime_as_in_torch(name, graph, graph_of_any_time, pipeline):
    """Also one that calls several times a step, or adds noise; a graph of whole times refuses others in one line."""
    sampling = SAMPLING.model_copy(update={"scheduler": name})
    expected = sample_images(schedule_pipeline(pipeline, BOTH), PROMPTS[:2], sampling)
    full = sample_images(pipeline, PROMPTS[:2], sampling)
    for file in (graph, graph_of_any_time):
        if file == graph and name not in ("lcm", "pndm"):
            with pytest.raises(InputError, match="takes whole timesteps, and the scheduler gave .*: export the model"):
                sample_images(in_runtime(pipeline, file, BOTH), PROMPTS[:1], sampling)
            continue
        found = sample_images(in_runtime(pipeline, file, BOTH), PROMPTS[:2], sampling)
        near = image_fidelity(expected, found)["psnr_db"]
        assert near > 50 and image_fidelity(full, found)["psnr_db"] < near - 5


def test_both_graphs_have_one_file_of_weights(graph):
    assert sorted(file.name for file in graph.parent.iterdir()) == [
        "config.json",
        "model.onnx",
        "model.onnx.data",
        "shallow.onnx",
    ]
    shallow = onnx.load(str(graph.parent / "shallow.onnx"), load_external_data=False)
    places = {e.value for t in shallow.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}
    inside = sum(len(t.raw_data) for t in shallow.graph.initializer)
    assert inside < 0.01 * (graph.parent / "model.onnx.data").stat().st_size
    whole = onnx.load(str(graph), load_external_data=False)
    assert len(shallow.graph.node) < len(whole.graph.node)
    assert [value.name for value in whole.graph.output] == ["out_sample", "kept"]


def test_what_the_graphs_cannot_follow_is_refused_in_one_line(graph, pipeline, tmp_path):
    from exporters.graphs.export import export_unet
    from exporters.graphs.pipeline import example_call

    other = make_schedule(2, 6, deep_every=2)
    copied = Path(shutil.copytree(graph.parent, tmp_path / "copied"))
    shallow = onnx.load(str(copied / "shallow.onnx"), load_external_data=False)
    next(one for one in shallow.metadata_props if one.key == "slimdiff.depth").value = "up_blocks.2"
    (copied / "shallow.onnx").write_bytes(shallow.SerializeToString())
    with pytest.raises(InputError, match="shallow.onnx begins with up_blocks.2, and the schedule reuses up_blocks.1"):
        in_runtime(pipeline, copied / "model.onnx", other)
    plain = export_unet(pipeline.unet, tmp_path / "plain", example_call(pipeline), scheduler=pipeline.scheduler)
    with pytest.raises(InputError, match="has no shallow.onnx, and the schedule reuses up_blocks.1"):
        in_runtime(pipeline, plain, other)
    with pytest.raises(InputError, match="takes one batch alone, and steps without guidance are half of it"):
        in_runtime(pipeline, plain, make_schedule(2, 6, guidance_interval=(0, 0.5)))


def test_the_whole_graph_is_the_plain_one_without_a_schedule(graph, pipeline):
    from exporters.runtimes.unet import UNet

    unet = UNet.open(graph, threads=1)
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 801, "encoder_hidden_states": torch.randn(2, 20, 32)}
    call["encoder_hidden_states"] = torch.randn(2, *unet.inputs["encoder_hidden_states"][1:])
    with torch.no_grad():
        torch.testing.assert_close(unet(**call).sample, pipeline.unet(**call).sample, rtol=1e-4, atol=1e-4)


def test_parts_and_a_depth_give_what_the_whole_and_its_shallow_graph_give(graph, pipeline, tmp_path):
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled
    from exporters.settings import ExportSettings

    settings = ExportSettings(split=True)
    call = example_call(pipeline)
    folder, shallow = export_scheduled(pipeline.unet, tmp_path, call, BOTH, settings, scheduler=pipeline.scheduler)
    assert shallow == tmp_path / "step" / "shallow.onnx" and not (tmp_path / "model.onnx").exists()
    assert {file.name for file in shallow.parent.iterdir()} == {"model.onnx", "model.onnx.data", "shallow.onnx"}
    stored = sum(file.stat().st_size for file in folder.rglob("*.data"))
    assert stored <= 1.01 * (graph.parent / "model.onnx.data").stat().st_size  # every weight once

    one, two = (in_runtime(pipeline, file, BOTH).unet.passes for file in (graph, folder))
    torch.manual_seed(2)
    prompt = torch.randn(2, *one.denoiser.inputs["encoder_hidden_states"][1:])
    arguments = {"sample": torch.randn(2, 4, 8, 8), "timestep": 801, "encoder_hidden_states": prompt}
    with torch.no_grad():
        expected, kept = one.whole(arguments, BOTH.depth)
        for found, right in zip(two.whole(arguments, BOTH.depth), (expected, kept), strict=True):
            assert float((found - right).norm() / right.norm()) < 1e-6
        right, found = (passes.shallow(arguments | {"timestep": 701}, BOTH.depth, kept) for passes in (one, two))
        assert float((found - right).norm() / right.norm()) < 1e-6
        assert len(two.denoiser.session._held["prompt"]) == 1 and two.session._held is two.denoiser.session._held
    images = [sample_images(in_runtime(pipeline, file, BOTH), PROMPTS[:2], SAMPLING) for file in (graph, folder)]
    assert image_fidelity(*images)["psnr_db"] is None or image_fidelity(*images)["psnr_db"] > 90


def test_a_depth_is_reused_in_int8_and_the_shallow_graph_has_the_whole_ones_steps(pipeline, tmp_path):
    pytest.importorskip("nncf", reason="int8 needs the extra int8")
    from exporters.graphs.int8_layers import int8_layers
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.reading import read_graph
    from exporters.graphs.scheduled import export_scheduled
    from exporters.settings import ExportSettings

    calls = record_calls(pipeline, PROMPTS[:1], SAMPLING.model_copy(update={"batch": 1}))
    how = ExportSettings(precision="int8", int8_error=0.01)
    graphs = export_scheduled(pipeline.unet, tmp_path, example_call(pipeline), BOTH, how, calibration=calls)
    whole, shallow = (int8_layers(read_graph(graph)) for graph in graphs)
    assert set(shallow) < set(whole) and shallow
    for path, layer in shallow.items():
        assert [s.tolist() for s in layer.scales] == [s.tolist() for s in whole[path].scales]
    assert sum(f.stat().st_size for f in tmp_path.glob("*.data")) == (tmp_path / "model.onnx.data").stat().st_size
    expected = sample_images(schedule_pipeline(pipeline, BOTH), PROMPTS[:2], SAMPLING)
    rounded = sample_images(in_runtime(pipeline, graphs[0], BOTH), PROMPTS[:2], SAMPLING)
    assert image_fidelity(expected, rounded)["psnr_db"] > 20


def test_a_pipeline_that_is_loaded_makes_its_images_by_the_schedule_beside_it(pipeline, tmp_path):
    from exporters import load_pipeline
    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled_pipeline
    from exporters.settings import ExportSettings

    export_scheduled_pipeline(pipeline, tmp_path, BOTH, ExportSettings(), call=example_call(pipeline))
    BOTH.save(tmp_path / "schedule.json")
    sides = {True: schedule_pipeline(pipeline, BOTH), False: pipeline}
    for scheduled, expected in sides.items():
        opened = load_pipeline(tmp_path, threads=1, scheduled=scheduled)
        images = [sample_images(one, PROMPTS[:2], SAMPLING) for one in (expected, opened)]
        assert image_fidelity(*images)["psnr_db"] > 60
    assert image_fidelity(images[0], sample_images(sides[True], PROMPTS[:2], SAMPLING))["psnr_db"] < 55
    (tmp_path / "unet" / "shallow.onnx").unlink()
    with pytest.raises(InputError, match="unet has no shallow.onnx, and the schedule reuses up_blocks.1"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("steering", ["controlnet", "adapter"])
def test_what_steers_a_unet_goes_with_a_depth(steering, pipeline, tiny, tmp_path):
    from families.steering import make_adapter, make_controlnet, picture

    from exporters.graphs.pipeline import example_call
    from exporters.graphs.scheduled import export_scheduled

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    small = with_denoiser(pipeline, tiny.unet(**blocks)) if steering == "controlnet" else pipeline
    part = make_controlnet(small.unet) if steering == "controlnet" else make_adapter((32, 64))
    part.save_pretrained(tmp_path / "part")
    how: Any = (
        {"controlnet": (str(tmp_path / "part"),)} if steering == "controlnet" else {"adapter": str(tmp_path / "part")}
    )
    steered = steer(small, SteeringSettings(**how))
    call = example_call(steered)
    graphs = export_scheduled(steered.unet, tmp_path / "onnx", call, BOTH, scheduler=steered.scheduler)
    whole, shallow = ({i.name for i in onnx.load(str(file), load_external_data=False).graph.input} for file in graphs)
    residuals = {name for name in whole if "residual" in name}
    assert residuals and shallow - whole == {"kept"}
    assert {name for name in shallow if "residual" in name} < residuals  # those of its own blocks

    inputs = [{"prompt": "abc", "image": picture()}]
    sampling = SAMPLING.model_copy(update={"batch": 1, "height": 16, "width": 16})
    expected = sample_images(schedule_pipeline(steered, BOTH), inputs, sampling)
    found = sample_images(in_runtime(steered, graphs[0], BOTH), inputs, sampling)
    near = image_fidelity(expected, found)["psnr_db"]
    others = sample_images(steered, inputs, sampling), sample_images(schedule_pipeline(small, BOTH), ["abc"], sampling)
    assert near > 60 and all(image_fidelity(other, found)["psnr_db"] < near - 5 for other in others)


def test_a_pipeline_that_runs_by_a_schedule_is_not_exported_without_it(pipeline, tmp_path):
    from exporters import export_pipeline, export_unet
    from exporters.graphs.pipeline import example_call

    scheduled: Any = schedule_pipeline(pipeline, BOTH)
    with pytest.raises(InputError, match="runs by a schedule"):
        export_pipeline(scheduled, tmp_path / "pipeline")
    with pytest.raises(InputError, match="runs by a schedule"):
        export_unet(scheduled.unet, tmp_path / "unet", example_call(pipeline))
    assert not [*tmp_path.iterdir()]

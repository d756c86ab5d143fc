"""Engines by a schedule: of all that its steps run, for both batches, read back and opened by its denoiser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slimdiff.errors import InputError, SlimdiffError
from slimdiff.schedule import Schedule, make_schedule

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")

from exporters import registry  # noqa: E402
from exporters.engine.build import build_engine, request_engine  # noqa: E402
from exporters.engine.check import read_engine  # noqa: E402
from exporters.engine.shapes import with_single_branches  # noqa: E402
from exporters.graphs.scheduled import export_scheduled  # noqa: E402
from exporters.layout import engine_folders  # noqa: E402
from exporters.runtimes.scheduled import schedule_graphs  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from exporters.settings import EngineSettings, ExportSettings  # noqa: E402
from slimdiff.denoising.scheduled import schedule_pipeline  # noqa: E402
from slimdiff.denoising.trajectory import sample_images, with_denoiser  # noqa: E402
from slimdiff.fidelity import image_fidelity  # noqa: E402
from slimdiff.settings import Sampling  # noqa: E402
from slimdiff.storage import manifest  # noqa: E402

BOTH = make_schedule(2, 6, guidance_interval=(0, 0.5), deep_every=3)
SETTINGS = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
SAMPLING = Sampling(steps=6, batch=1, guidance=3.0, seed=1)
PROMPTS = ["a red circle"]


@pytest.fixture(scope="module")
def graph(slim_and_plan, calls, tmp_path_factory) -> Path:
    """The slim UNet's, whole, with the shallow one beside it."""
    return export_scheduled(slim_and_plan[0], tmp_path_factory.mktemp("graphs"), calls[0], BOTH)[0]


@pytest.fixture(scope="module")
def engines(rtx, graph, slim_and_plan, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    request_engine(graph, SETTINGS, plan=slim_and_plan[1], branches=2).build(out)
    return out


def test_both_graphs_are_engines_that_follow_the_plan(engines, slim_and_plan):
    report, shallow = read_engine(engines), read_engine(engines / "shallow")
    files = {"model.engine": engines / "model.engine", "shallow/model.engine": engines / "shallow" / "model.engine"}
    assert {row["file"]: row["sha256"] for row in report["engines"]} == {
        name: manifest.sha256_of(file) for name, file in files.items()
    }
    assert report["bytes"] == sum(file.stat().st_size for file in files.values())
    inside = {}
    for row in report["engines"]:
        assert row["sites"] and all(site["ok"] for site in row["sites"]) and row["int8"] == []
        inside[row["file"]] = {site["site"] for site in row["sites"]}
    assert inside["shallow/model.engine"] < inside["model.engine"] == set(slim_and_plan[1].sites)
    assert not any("mid_block" in site for site in inside["shallow/model.engine"])
    assert [tensor["name"] for tensor in report["outputs"]] == ["out_sample", "kept"]
    assert "kept" in [tensor["name"] for tensor in shallow["inputs"]] and shallow["parts"]["depth"] == BOTH.depth


def test_from_python_the_schedule_beside_the_graph_goes_along(rtx, graph, slim_and_plan, tmp_path):
    source = shutil.copytree(graph.parent, tmp_path / "onnx" / "unet")
    (source.parent / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    BOTH.save(source.parent / "schedule.json")
    report = build_engine(source / "model.onnx", tmp_path / "engine", SETTINGS, plan=slim_and_plan[1])
    assert Schedule.load(tmp_path / "engine") == BOTH
    manifest.verify_manifest(tmp_path / "engine", exact=True)
    profiles = report["parts"]["shapes"]["profiles"]
    assert [{ends["sample"][0] for ends in [_of(profile)]} for profile in profiles] == [{2}, {1}]
    (source / "shallow.onnx").unlink()
    with pytest.raises(InputError, match="unet has no shallow.onnx, and the schedule reuses up_blocks.1: export the"):
        build_engine(source / "model.onnx", tmp_path / "engine", SETTINGS)
    (source.parent / "schedule.json").unlink()
    build_engine(source / "model.onnx", tmp_path / "engine", SETTINGS.model_copy(update={"batch": 1}))
    assert not (tmp_path / "engine" / "schedule.json").exists()


def _of(profile: dict) -> dict[str, list[int]]:
    """The shapes that a profile is fastest at."""
    return {name: ends["opt"] for name, ends in profile.items()}


def test_each_takes_the_batches_that_steps_have(engines):
    for folder in (engines, engines / "shallow"):
        profiles = read_engine(folder)["parts"]["shapes"]["profiles"]
        batches = [{tuple(ends.values())[0] for ends in _batches(profile)} for profile in profiles]
        assert batches == [{2}, {1}]
        assert all(len(set(ends.values())) == 1 for profile in profiles for ends in _batches(profile))


def _batches(profile: dict) -> list[dict[str, int]]:
    return [{end: shape[0] for end, shape in ends.items()} for ends in profile.values() if ends["min"]]


def test_they_are_built_again_when_the_shallow_graph_changes(engines, graph, slim_and_plan, calls, tmp_path):
    plan = slim_and_plan[1]
    request = request_engine(graph, SETTINGS, plan=plan, branches=2)
    assert request.why_build(engines) is None
    request.reuse(engines, tmp_path / "again")
    assert read_engine(tmp_path / "again") == read_engine(engines)
    assert (tmp_path / "again" / "shallow" / "engine.json").is_file()
    other = shutil.copytree(graph.parent, tmp_path / "other")
    (other / "shallow.onnx").unlink()
    assert request_engine(other / "model.onnx", SETTINGS, plan=plan, branches=2).why_build(engines) == "shallow changed"
    fixed = "of 2 alone: export the model with this schedule"
    plain = export_scheduled(slim_and_plan[0], tmp_path / "plain", calls[0], make_schedule(2, 6, deep_every=2))[0]
    with pytest.raises(InputError, match=fixed):
        request_engine(plain, SETTINGS, plan=plan, branches=2)
    for each in request_engine(plain, SETTINGS, plan=plan), request_engine(plain, SETTINGS, plan=plan).shallow:
        assert "fixed" in each.parts["shapes"]


def test_a_shallow_network_that_is_not_the_plans_is_refused(rtx, graph, slim_and_plan, tmp_path):
    plan = slim_and_plan[1]
    wrong = {
        n: type(s)(s.group, s.path, s.heads, s.rank + 8 * n.startswith("up_blocks.1")) for n, s in plan.sites.items()
    }
    request = request_engine(graph, SETTINGS, plan=plan, branches=2)
    object.__setattr__(request.shallow, "plan", type(plan)(wrong))
    with pytest.raises(SlimdiffError, match="the parsed network is not what the plan says"):
        request.shallow.build(tmp_path / "shallow")


def test_the_scheduled_denoiser_opens_engines(engines, graph, slim_and_plan, pipeline, tmp_path, monkeypatch):
    """Graphs stand in the engines' files, as those need a GPU: all else is as it was built."""
    pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "runtimes")
    from toy_runtime import TOY_ENGINE

    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    registry.register(TOY_ENGINE)
    folder = shutil.copytree(engines, tmp_path / "engines")
    for place, file in ((folder / "shallow", "shallow.onnx"), (folder, "model.onnx")):
        shutil.copy(graph.with_name(file), place / "model.engine")
        shutil.copy(graph.with_name("model.onnx.data"), place)
        about = manifest.read_manifest(place)
        manifest.write_manifest(place, "engine", about["made_from"], about["runs_on"])
    slim = with_denoiser(pipeline, slim_and_plan[0])
    runs = with_denoiser(pipeline, UNet.open(folder, "toy-engine"))
    found = sample_images(schedule_graphs(runs, BOTH, folder, "toy-engine"), PROMPTS, SAMPLING)
    expected = sample_images(schedule_pipeline(slim, BOTH), PROMPTS, SAMPLING)
    near = image_fidelity(expected, found)["psnr_db"]
    assert near > 60 and image_fidelity(sample_images(slim, PROMPTS, SAMPLING), found)["psnr_db"] < near - 5
    for where, other in (("begins with up_blocks.1", "up_blocks.2"), ("has no shallow/model.engine", "up_blocks.1")):
        deeper = BOTH.model_copy(update={"depth": other, "levels": 3})
        with pytest.raises(InputError, match=f"{where}, and the schedule reuses {other}: build it from a folder"):
            schedule_graphs(runs, deeper, folder, "toy-engine")
        shutil.rmtree(folder / "shallow", ignore_errors=True)


def test_a_batch_for_one_branch_is_added_where_none_is_taken():
    dims = {"sample": ["batch", 4, 8, 8], "timestep": [], "text": ["batch", 7, 32]}

    def batches(whole: dict, branches: int = 2) -> list[tuple[int, ...]]:
        shapes = with_single_branches(dims, whole, branches)
        if shapes["shapes"]:
            return [(shapes["shapes"]["sample"][0],)]
        assert all(p.opt["text"][0] == p.opt["sample"][0] and p.opt["timestep"] == () for p in shapes["profiles"])
        return [tuple(getattr(p, end)["sample"][0] for end in ("min", "opt", "max")) for p in shapes["profiles"]]

    def shapes(batch: int) -> dict[str, list[int]]:
        return {"sample": [batch, 4, 8, 8], "timestep": [], "text": [batch, 7, 32]}

    def profile(*ends: int) -> dict:
        sizes = dict(zip(("min", "opt", "max"), map(shapes, ends), strict=True))
        return {name: {end: sizes[end][name] for end in sizes} for name in dims}

    assert batches({"fixed": shapes(4)}) == [(4, 4, 4), (2, 2, 2)]
    assert batches({"fixed": shapes(3)}, 3) == [(3, 3, 3), (1, 1, 1)]
    assert batches({"profiles": [profile(1, 2, 8)]}) == [(1, 2, 8)]
    assert batches({"profiles": [profile(2, 4, 8)]}) == [(2, 4, 8)]
    assert batches({"profiles": [profile(4, 4, 8)]}) == [(4, 4, 8), (2, 2, 4)]
    with pytest.raises(InputError, match="one of 2 branches, and a batch of 3 is no multiple"):
        batches({"fixed": shapes(3)})
    with pytest.raises(InputError, match="has one of 2 alone"):
        with_single_branches({**dims, "sample": [2, 4, 8, 8]}, {"fixed": shapes(2)}, 2)


def test_of_a_unet_in_parts_the_step_has_both(rtx, slim_and_plan, calls, tmp_path):
    unet, plan = slim_and_plan
    settings = ExportSettings(split=True)
    folder = export_scheduled(unet, tmp_path / "onnx", calls[0], BOTH, settings)[0]
    request = request_engine(folder, SETTINGS, plan=plan, branches=2)
    report = request.build(tmp_path / "engine")
    assert [row["file"] for row in report["engines"]] == ["step/model.engine", "step/shallow/model.engine"]
    assert all(site["ok"] for row in report["engines"] for site in row["sites"])
    assert all(site["ok"] for site in report["sites"]) and request.why_build(tmp_path / "engine") is None
    places = [place.relative_to(tmp_path / "engine").as_posix() for place in engine_folders(tmp_path / "engine")]
    assert places[0] == "step/shallow" and set(places) == {"step/shallow", "prompt", "time", "step"}
    given = {tensor["name"] for tensor in read_engine(tmp_path / "engine" / "step" / "shallow")["inputs"]}
    assert "kept" in given and not any("mid_block" in name for name in given)
    for part in ("prompt", "step"):
        profiles = read_engine(tmp_path / "engine" / part)["parts"]["shapes"]["profiles"]
        assert len(profiles) == 2


@pytest.mark.slow
def test_int8_is_read_back_from_both_networks(rtx, dense, calls, tmp_path):
    pytest.importorskip("nncf", reason="int8 needs the extra int8")
    how = ExportSettings(precision="int8", int8_error=0.01)
    graph = export_scheduled(dense, tmp_path / "onnx", calls[0], BOTH, how, calibration=calls)[0]
    report = request_engine(graph, SETTINGS, branches=2).build(tmp_path / "engine")
    whole, shallow = (set(row["int8"]) for row in report["engines"])
    assert shallow and shallow < whole and report["precision"] == "int8"

"""Engines of a denoiser in parts: one request, one report and one manifest, and shapes that follow the whole's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slimdiff.errors import InputError, MissingPackageError, SlimdiffError

onnx = pytest.importorskip("onnx", reason="engines are built from ONNX")

from exporters.engine.build import request_engine  # noqa: E402
from exporters.engine.check import check_engine, read_engine  # noqa: E402
from exporters.engine.gpu import Gpu, gpu_here  # noqa: E402
from exporters.engine.shapes import part_shapes  # noqa: E402
from exporters.graphs.split import split_graph  # noqa: E402
from exporters.layout import PARTS  # noqa: E402
from exporters.runtimes.opening import open_session  # noqa: E402
from exporters.settings import EngineSettings  # noqa: E402

SETTINGS = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, exported) -> Path:
    """The slim graph in fp16, in parts."""
    folder = tmp_path_factory.mktemp("parts")
    split_graph(exported["slim-fp16"], folder)
    shutil.copy(exported["slim-fp16"].parent / "config.json", folder)
    return folder


@pytest.fixture(scope="module")
def engines(rtx, folder, slim_and_plan, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    request_engine(folder, SETTINGS, plan=slim_and_plan[1]).build(out)
    return out


def test_the_parts_are_one_engine_that_follows_the_plan(engines, slim_and_plan):
    report = check_engine(engines, gpu=lambda: Gpu("a GPU", "sm89", "580.65"))
    assert {i["name"]: i["shape"] for i in report["inputs"]} == {
        "sample": [2, 4, 8, 8],
        "timestep": [2],
        "encoder_hidden_states": [2, 7, 32],
    }
    assert report["bytes"] == sum((engines / part / "model.engine").stat().st_size for part in PARTS)
    assert report["precision"] == "fp16" and report["fused_attention"]["calls"] > 0
    assert all(row["ok"] for row in report["sites"])
    seen = {(row["site"], layer) for row in report["sites"] for layer in row["expected"]}
    groups = {"query_key": ("to_q", "to_k", "query_key_dim"), "value_output": ("to_v", "to_out.0", "value_dim")}
    sites = {name: site.group for name, site in slim_and_plan[1].sites.items()}
    assert seen >= {(name, layer) for name, group in sites.items() for layer in groups.get(group, ())}


def test_it_is_built_again_when_a_part_changes(engines, folder, slim_and_plan, tmp_path):
    plan = slim_and_plan[1]
    assert request_engine(folder, SETTINGS, plan=plan).why_build(engines) is None
    assert request_engine(folder, SETTINGS, plan=plan).reuse(engines, tmp_path / "again")["key"]
    assert read_engine(tmp_path / "again") == read_engine(engines)
    other = shutil.copytree(folder, tmp_path / "other")
    model = onnx.load(other / "time" / "model.onnx")
    model.doc_string = "changed"
    onnx.save(model, other / "time" / "model.onnx")
    assert request_engine(other, SETTINGS, plan=plan).why_build(engines) == "engines changed"
    damaged = shutil.copytree(engines, tmp_path / "damaged")
    (damaged / "prompt" / "model.engine").write_bytes(b"")
    assert "was changed" in request_engine(folder, SETTINGS, plan=plan).why_build(damaged)


def test_a_part_that_is_not_the_plans_is_refused(rtx, folder, slim_and_plan, tmp_path):
    plan = slim_and_plan[1]
    wrong = {n: type(s)(s.group, s.path, s.heads, s.rank + 8 * ("attn2" in s.path)) for n, s in plan.sites.items()}
    with pytest.raises(InputError, match="is not what the plan says"):
        request_engine(folder, SETTINGS, plan=type(plan)(wrong))
    request = request_engine(folder, SETTINGS, plan=plan)
    for part in ("prompt", "step"):
        object.__setattr__(request.requests[part], "plan", type(plan)(wrong))
        with pytest.raises(SlimdiffError, match="the parsed network is not what the plan says"):
            request.requests[part].build(tmp_path / part)


def test_shapes_of_parts_follow_the_whole():
    whole = {"fixed": {"sample": [4, 4, 8, 8], "timestep": [], "encoder_hidden_states": [4, 7, 32]}}
    crossing = "mid_block.attn2.to_k"
    assert part_shapes({"encoder_hidden_states": ["batch", 7, 32]}, whole)["shapes"] == {
        "encoder_hidden_states": (4, 7, 32)
    }
    assert part_shapes({"timestep": ["batch"]}, whole)["shapes"] == {"timestep": (4,)}
    assert part_shapes({"sample": ["batch"], crossing: ["batch"]}, whole)["shapes"] == {"sample": (4, 4, 8, 8)}
    low = {name: {"min": [1, *s[1:]] if s else [], "opt": s, "max": s} for name, s in whole["fixed"].items()}
    wide = {name: ends | {"max": [8, *ends["max"][1:]] if ends["max"] else []} for name, ends in low.items()}
    taken = part_shapes({"timestep": ["batch"]}, {"profiles": [low, wide, low]})["profiles"]
    assert [(p.min["timestep"], p.opt["timestep"], p.max["timestep"]) for p in taken] == [
        ((1,), (4,), (4,)),
        ((1,), (4,), (8,)),
    ]


@pytest.mark.skipif(gpu_here() is not None, reason="there is a GPU here")
def test_all_that_they_miss_here_is_the_gpu(engines):
    with pytest.raises(MissingPackageError, match="runs on sm89, and there is no GPU here"):
        open_session(engines, "tensorrt-rtx")

"""The key of an engine: nothing changed, the same key; anything changed, another one, and what it was is told."""

from __future__ import annotations

import copy
import importlib.metadata
import shutil

import onnx
import pytest

from exporters.engine.build import request_engine
from exporters.engine.check import read_engine
from exporters.engine.gpu import Gpu
from exporters.engine.key import differences
from exporters.settings import EngineSettings, ShapeRange
from slimdiff.errors import InputError
from slimdiff.storage.manifest import fingerprint

RTX = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", "580.65.06")
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "sm120", "580.65.06")
HERE = EngineSettings(backend="tensorrt-rtx")


def parts(graph, settings=RTX, gpu=None, **more):
    return request_engine(graph, settings, gpu=lambda: gpu, **more).parts


@pytest.fixture
def graph(rtx, exported, tmp_path):
    """A copy of the slim graph that a test may change."""
    shutil.copytree(exported["slim-fp16"].parent, tmp_path / "onnx")
    return tmp_path / "onnx" / "model.onnx"


def test_nothing_changed_and_in_another_folder_is_the_same_key(graph, exported):
    one, other = parts(graph), parts(exported["slim-fp16"])
    assert one == other and fingerprint(one) == fingerprint(other) and differences(one, other) == []
    assert one["precision"] == "fp16" and parts(exported["slim"])["precision"] == "fp32"


def test_a_changed_graph_is_another_engine(graph):
    before = parts(graph)
    model = onnx.load(str(graph), load_external_data=False)
    model.graph.node[0].doc_string = "changed"
    graph.write_bytes(model.SerializeToString())
    assert differences(before, parts(graph)) == ["graph changed"]


def test_one_changed_byte_of_the_weights_is_another_engine(graph):
    before = parts(graph)
    data = graph.parent / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert differences(before, parts(graph)) == ["weights changed"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"workspace_gib": 2.0}, ["options.workspace_gib None -> 2.0"]),
        ({"tf32": True}, ["options.tf32 False -> True"]),
        ({"targets": ["sm89", "sm120"]}, ["runs_on.targets ['sm89'] -> ['sm120', 'sm89']"]),
    ],
)
def test_changed_options_are_another_engine(graph, change, told):
    assert differences(parts(graph, gpu=ADA), parts(graph, RTX.model_copy(update=change), ADA)) == told


def test_what_does_not_change_the_engine_keeps_its_key(graph):
    same = RTX.model_copy(update={"check_memory": False})
    assert differences(parts(graph), parts(graph, same)) == []
    both = [RTX.model_copy(update={"targets": t}) for t in (["sm89", "sm120"], ["sm120", "sm89"])]
    assert differences(parts(graph, both[0]), parts(graph, both[1])) == []


def test_changed_shapes_are_another_engine(rtx, exported):
    two, four = (parts(exported["dense-open"], RTX.model_copy(update={"batch": n})) for n in (2, 4))
    assert "shapes.fixed.sample [2, 4, 8, 8] -> [4, 4, 8, 8]" in differences(two, four)
    ends = {end: {"sample": f"{n}x4x8x8"} for end, n in (("min", 1), ("opt", 2), ("max", 4))}
    ranged = parts(exported["dense-open"], RTX.model_copy(update={"profiles": [ShapeRange(**ends)]}))
    assert differences(two, ranged)


def test_another_plan_is_checked_again(graph, slim_and_plan):
    plan = slim_and_plan[1]
    fewer = copy.deepcopy(plan)
    fewer.sites.popitem()
    assert differences(parts(graph, plan=plan), parts(graph, plan=fewer)) == ["plan changed"]
    assert differences(parts(graph), parts(graph, plan=plan)) == ["plan changed"]


def test_the_gpu_counts_where_it_is_the_target(graph):
    mine, newer_driver = parts(graph, HERE, ADA), parts(graph, HERE, Gpu(ADA.name, ADA.capability, "590.10"))
    assert differences(mine, newer_driver) == ["runs_on.gpu.driver 580.65.06 -> 590.10"]
    assert "runs_on.gpu.capability sm89 -> sm120" in differences(mine, parts(graph, HERE, BLACKWELL))
    assert differences(parts(graph, RTX, ADA), parts(graph, RTX, BLACKWELL)) == []


@pytest.mark.parametrize("package", ["polygraphy", "onnx", "tensorrt-rtx"])
def test_another_version_is_another_engine(graph, package, monkeypatch):
    before = parts(graph)
    real = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda n: "99.0" if n.startswith(package) else real(n))
    assert differences(before, parts(graph)) == [f"versions.{package} {before['versions'][package]} -> 99.0"]


def test_our_own_builder_counts(graph):
    before = parts(graph)
    after = {**before, "builder": "0" * 64}
    assert fingerprint(before) != fingerprint(after) and differences(before, after) == ["builder changed"]


def test_an_engine_knows_whether_it_is_the_one_asked_for(graph, slim_engine, slim_and_plan, tmp_path):
    folder, report = slim_engine
    request = request_engine(graph, RTX, plan=slim_and_plan[1], gpu=lambda: None)
    assert request.key == report["key"] and request.why_build(folder) is None
    assert request.why_build(tmp_path / "nothing") == "there is none yet"
    assert request.reuse(folder, tmp_path / "taken") == report
    assert read_engine(tmp_path / "taken") == report and request.why_build(tmp_path / "taken") is None
    (tmp_path / "taken" / "model.engine").write_bytes(b"changed")
    assert "SHA-256 differs" in request.why_build(tmp_path / "taken")
    other = request_engine(graph, RTX.model_copy(update={"tf32": True}), plan=slim_and_plan[1], gpu=lambda: None)
    assert other.why_build(folder) == "options.tf32 False -> True"


def test_weights_outside_the_graphs_folder_are_refused(graph):
    model = onnx.load(str(graph), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../elsewhere.data"
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="outside its folder"):
        request_engine(graph, RTX, gpu=lambda: None)

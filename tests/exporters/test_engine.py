"""Engines built for real by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import copy
import importlib.util
import json

import pytest

from exporters import engine
from exporters.engine import EngineSettings, available_backend, build_engine, explain
from exporters.onnx_export import ExportSettings, export_unet
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError

RTX = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")


@pytest.fixture(scope="module")
def rtx():
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: engines need the extra tensorrt-rtx")


@pytest.fixture(scope="module")
def slim_engine(rtx, tmp_path_factory, exported, slim_and_plan):
    folder = tmp_path_factory.mktemp("engine")
    return folder, build_engine(exported["slim-fp16"], folder, RTX, plan=slim_and_plan[1])


def test_engine_and_report_are_written_and_nothing_else(slim_engine):
    folder, report = slim_engine
    assert {p.name for p in folder.iterdir()} == {"model.engine", "engine.json"}
    assert json.loads((folder / "engine.json").read_text()) == report
    assert (folder / "model.engine").stat().st_size == report["bytes"] > 0
    assert report["backend"] == "tensorrt-rtx" and report["targets"] == ["sm89"] and report["seconds"] > 0
    assert str(folder.parent) not in (folder / "engine.json").read_text()


def test_shapes_and_dtypes_are_the_graphs(slim_engine):
    report = slim_engine[1]
    inputs = {i["name"]: (i["shape"], i["dtype"]) for i in report["inputs"]}
    assert inputs == {
        "sample": ([2, 4, 8, 8], "float16"),
        "timestep": ([], "int64"),
        "encoder_hidden_states": ([2, 7, 32], "float16"),
    }
    assert report["outputs"] == [{"name": "out_sample", "shape": [2, 4, 8, 8], "dtype": "float16"}]


def test_attention_products_have_the_plans_head_dims(slim_engine, slim_and_plan):
    report, plan = slim_engine[1], slim_and_plan[1]
    sites = [s for s in plan.sites.values() if s.group == "query_key"]
    found = {row["module"]: row for row in report["attention"]}
    assert set(found) == {s.path for s in sites}
    for site in sites:
        row = found[site.path]
        assert (row["heads"], row["query_key_dim"], row["value_dim"]) == (site.heads, site.rank, site.rank)
        assert row["keys"] == (7 if site.path.endswith("attn2") else row["queries"])
    assert all(row["ok"] for row in report["sites"])
    assert {row["site"] for row in report["sites"]} == set(plan.sites)


def test_fp16_attention_fuses_at_16_dims_and_fp32_never(slim_engine, rtx, exported, tmp_path):
    report = slim_engine[1]
    assert report["fused_attention"]["calls"] == len(report["attention"]) == 8
    assert 1 <= report["fused_attention"]["kernels"] <= 8
    single = build_engine(exported["slim"], tmp_path, RTX)
    assert single["fused_attention"] == {"calls": 0, "kernels": 0}
    assert single["sites"] is None and single["inputs"][0]["dtype"] == "float32"


def test_head_dims_of_8_do_not_fuse(rtx, tiny, calls, tmp_path):
    unet = tiny.unet(heads=4)
    tiny.narrow(unet, head_dim=8)
    file = export_unet(unet, tmp_path / "onnx", calls[0], ExportSettings(precision="fp16"))
    assert build_engine(file, tmp_path / "engine", RTX)["fused_attention"]["calls"] == 0


def test_a_plan_that_lies_is_refused_and_leaves_no_engine(rtx, exported, slim_and_plan, tmp_path, monkeypatch):
    plan = copy.deepcopy(slim_and_plan[1])
    name = next(n for n, s in plan.sites.items() if s.group == "value_output")
    plan.sites[name].rank = 24
    with pytest.raises(InputError, match=name):
        build_engine(exported["slim-fp16"], tmp_path, RTX, plan=plan)
    # Had the graph been right and the parsed network not, that would be found too.
    monkeypatch.setattr(engine, "check_reduced_dims", lambda *_: [])
    with pytest.raises(SlimdiffError, match="parsed network.*" + name):
        build_engine(exported["slim-fp16"], tmp_path, RTX, plan=plan)
    assert not list(tmp_path.iterdir())


def test_open_batch_is_given_its_size_or_refused(rtx, exported, tmp_path):
    with pytest.raises(InputError, match="open dims.*say a batch"):
        build_engine(exported["dense-open"], tmp_path, RTX)
    report = build_engine(exported["dense-open"], tmp_path, RTX.model_copy(update={"batch": 4}))
    assert report["inputs"][0]["shape"] == report["outputs"][0]["shape"] == [4, 4, 8, 8]
    with pytest.raises(InputError, match="has batch 2"):
        build_engine(exported["dense"], tmp_path, RTX.model_copy(update={"batch": 4}))


def test_targets_are_checked(rtx, exported, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no target sm90.*sm89"):
        build_engine(exported["dense"], tmp_path, EngineSettings(backend="tensorrt-rtx", targets=["sm90"]))
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    with pytest.raises(InputError, match="name targets"):
        build_engine(exported["dense"], tmp_path, EngineSettings(backend="tensorrt-rtx"))
    with pytest.raises(ValueError, match="named like sm89"):
        EngineSettings(targets=["8.9"])


def test_broken_graphs_are_told_in_one_line(rtx, exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(exported["dense"].read_bytes())
    with pytest.raises(InputError, match="model.onnx.data, which is not beside it"):
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(SlimdiffError, match="parsing") as failed:
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    assert "\n" not in str(failed.value) and not list((tmp_path / "engine").iterdir())


def test_without_a_backend_the_extras_are_named(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert available_backend() is None
    with pytest.raises(MissingPackageError, match=r"slimdiff\[tensorrt-rtx\].*slimdiff\[gpu\]"):
        build_engine(exported["dense"], tmp_path)
    with pytest.raises(MissingPackageError, match=r"slimdiff\[gpu\]"):
        build_engine(exported["dense"], tmp_path, EngineSettings(backend="tensorrt"))


def test_tensorrt_is_taken_only_where_it_can_build(monkeypatch):
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    assert available_backend() == "tensorrt"
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    assert available_backend() == "tensorrt-rtx"


def test_progress_goes_to_stderr(rtx, exported, tmp_path, capfd):
    build_engine(exported["slim"], tmp_path, RTX, progress="engine")
    out, err = capfd.readouterr()
    assert out == "" and "engine: building" in err


@pytest.mark.parametrize(
    ("code", "log", "told"),
    [
        (-9, "stage: building\n", "out of memory while building: 2.0 GB of weights take about 6.4 GB"),
        (1, "stage: building\n[E] Could not find any implementation for node {x}.", "no kernel was found for {x}"),
        (-11, "stage: parsing\n[E] odd\n", "ended by signal 11 while parsing: odd"),
        (1, "", "failed while starting: exit status 1"),
    ],
)
def test_failures_are_explained(code, log, told):
    assert told in explain(code, log, 2_000_000_000)

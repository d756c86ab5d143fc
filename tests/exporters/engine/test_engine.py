"""Engines built for real by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import copy
import json
import shutil
from types import SimpleNamespace

import pytest

from exporters.engine import backends, build
from exporters.engine.backends import available_backend
from exporters.engine.build import build_engine, request_engine
from exporters.engine.check import choose_profile, read_engine
from exporters.engine.errors import explain
from exporters.engine.gpu import Gpu
from exporters.engine.memory import available_memory, build_memory, demand_memory
from exporters.engine.network import dims_by_node
from exporters.engine.sites import compare_layers
from exporters.graphs.export import export_unet
from exporters.settings import EngineSettings, ExportSettings, ShapeRange
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
from slimdiff.progress import show_progress

RTX = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", "580.65.06")
onnx = pytest.importorskip("onnx", reason="the ONNX export needs the extra onnx")


def test_engine_and_report_are_written_and_nothing_else(slim_engine, exported):
    folder, report = slim_engine
    assert {p.name for p in folder.iterdir()} == {"model.engine", "engine.json", "config.json", "manifest.json"}
    assert json.loads((folder / "engine.json").read_text()) == report
    assert (folder / "model.engine").stat().st_size == report["bytes"] > 0
    assert report["backend"] == "tensorrt-rtx" and report["targets"] == ["sm89"] and report["seconds"] > 0
    assert report["weights"] == (exported["slim-fp16"].parent / "model.onnx.data").stat().st_size > 0
    assert 2**28 < report["peak_memory"] < 2**33
    for name in ("engine.json", "manifest.json"):
        assert str(folder.parent) not in (folder / name).read_text()


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
    monkeypatch.setattr(build, "compare_dims", lambda *_: [])
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


def test_targets_are_checked(rtx, exported, tmp_path):
    with pytest.raises(InputError, match="no target sm90.*sm89"):
        build_engine(exported["dense"], tmp_path, EngineSettings(backend="tensorrt-rtx", targets=["sm90"]))
    with pytest.raises(InputError, match="name targets"):
        request_engine(exported["dense"], EngineSettings(backend="tensorrt-rtx"), gpu=lambda: None)
    with pytest.raises(ValueError, match="named like sm89"):
        EngineSettings(targets=["8.9"])


def test_broken_graphs_are_told_in_one_line(rtx, exported, tmp_path):
    (tmp_path / "model.onnx").write_bytes(exported["dense"].read_bytes())
    with pytest.raises(InputError, match="model.onnx.data, which is not beside it"):
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    (tmp_path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(InputError, match="model.onnx.data has 5 bytes, and model.onnx takes"):
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    shutil.copy(exported["dense"].parent / "model.onnx.data", tmp_path)
    model = onnx.load(str(exported["dense"]), load_external_data=False)
    model.graph.node[-1].op_type = "Nowhere"
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(SlimdiffError, match="Nowhere") as failed:
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    assert "\n" not in str(failed.value) and not list((tmp_path / "engine").iterdir())


def test_without_a_backend_the_extras_are_named(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert available_backend() is None
    with pytest.raises(MissingPackageError, match=r"slimdiff\[tensorrt-rtx\].*slimdiff\[gpu\]"):
        build_engine(exported["dense"], tmp_path)
    with pytest.raises(MissingPackageError, match=r"slimdiff\[gpu\]"):
        build_engine(exported["dense"], tmp_path, EngineSettings(backend="tensorrt"))


def test_tensorrt_is_taken_only_where_it_can_build(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert available_backend(lambda: ADA) == "tensorrt"
    assert available_backend(lambda: None) == "tensorrt-rtx"


def test_progress_goes_to_stderr(rtx, exported, tmp_path, capfd):
    show_progress(True)
    try:
        build_engine(exported["slim"], tmp_path, RTX)
    finally:
        show_progress(False)
    out, err = capfd.readouterr()
    assert out == "" and "engine: building" in err


@pytest.mark.parametrize(
    ("code", "log", "told"),
    [
        (-9, "stage: building\n", "out of memory while building: 2.0 GB of weights take about"),
        (1, "stage: building\n[E] [optimizer.cpp] cudaError 2: out of memory\n", "out of memory while building"),
        (1, "stage: building\n[E] In CaskReader: CUDA initialization failure with error: 35\n", "CUDA found no GPU"),
        (1, "stage: building\n[E] Could not find any implementation for node {x}.", "no kernel was found for {x}"),
        (
            1,
            "[E] Error Code 1: Myelin ([pass.cpp:337: check] Cannot compile operation 'up.1.to_v/MatMul' for Turing "
            "(SM75): FP32 GEMM is not supported. In compileGraph)",
            "no kernel for sm75 at up.1.to_v (FP32 GEMM is not supported): leave that target out, or export in fp16",
        ),
        (-11, "stage: parsing\n[E] odd\n", "ended by signal 11 while parsing: odd"),
        (1, "", "failed while starting: exit status 1"),
    ],
)
def test_failures_are_explained(code, log, told):
    assert told in explain(code, log, 2_000_000_000)


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("[E] IRuntime: the engine plan file is not compatible with this version of TensorRT, expecting", "version"),
        ("[E] The engine plan file is generated on an incompatible device, expecting compute 8.6", "another GPU"),
        ("[F] Error reading CUDA GPU properties: (cudaError 35: CUDA driver version is insufficient)", "driver"),
    ],
)
def test_errors_of_opening_are_explained(log, told):
    assert told in explain(1, log, 0) and log not in explain(1, log, 0)
    assert told not in explain(1, "[E] something else", 0)


def test_an_operator_that_is_not_supported_is_named_with_its_module(rtx, exported, tmp_path):
    import onnx

    model = onnx.load(str(exported["slim-fp16"]), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    node.op_type = "Det"  # a standard operator which TensorRT-RTX's parser does not have
    del node.attribute[:]
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes((exported["slim-fp16"].parent / "model.onnx.data").read_bytes())
    module = node.name.rpartition("/")[0]
    assert module.endswith("attn1")
    with pytest.raises(SlimdiffError, match=f"no operator Det as the graph's module {module} uses it") as failed:
        build_engine(tmp_path / "model.onnx", tmp_path / "engine", RTX)
    assert "\n" not in str(failed.value)


def test_profiles_give_one_engine_for_ranges_of_shapes(rtx, tiny, calls, tmp_path):
    unet = tiny.unet(
        heads=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    plan = tiny.narrow(unet)
    file = export_unet(unet, tmp_path / "onnx", calls[0], ExportSettings(precision="fp16", dynamic_batch=True))
    ranges = [
        ShapeRange(**{end: {"sample": (n, 4, 8, 8)} for end, n in zip(("min", "opt", "max"), batches, strict=True)})
        for batches in ((1, 2, 4), (8, 8, 8))
    ]
    report = build_engine(file, tmp_path / "engine", RTX.model_copy(update={"profiles": ranges}), plan=plan)
    assert report["inputs"][0]["shape"] == [-1, 4, 8, 8]
    profile = report["parts"]["shapes"]["profiles"][0]
    assert profile["encoder_hidden_states"] == {"min": [1, 7, 32], "opt": [2, 7, 32], "max": [4, 7, 32]}
    # Each profile has kernels of its own.
    assert report["fused_attention"]["calls"] == 2 * len(report["attention"]) and all(r["ok"] for r in report["sites"])
    written = read_engine(tmp_path / "engine")
    given = {i["name"]: i["shape"] for i in report["inputs"]}
    for batch, index in ((2, 0), (3, 0), (8, 1)):
        assert choose_profile(written, {n: [batch if d < 0 else d for d in s] for n, s in given.items()}) == index


def test_memory_is_counted_before_a_build(rtx, exported, tmp_path, monkeypatch):
    demand_memory(10**9, available=int(build_memory(10**9)))
    with pytest.raises(InputError, match=r"1.0 GB of weights takes about .* GB of memory, and 2.0 GB are free"):
        demand_memory(10**9, available=2 * 10**9)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**8))
    with pytest.raises(InputError, match="0.1 GB are free"):
        build_engine(exported["slim"], tmp_path, RTX)
    assert not (tmp_path / "engine.json").exists()


def test_a_containers_memory_counts(tmp_path):
    everything = available_memory(tmp_path)
    (tmp_path / "memory.current").write_text("800000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 300000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_memory(tmp_path) == 500_000  # what is cached can be dropped
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) >= 0.5 * everything


def test_layers_of_an_engine_are_held_against_the_plan(slim_and_plan):
    plan = copy.deepcopy(slim_and_plan[1])
    name, site = next((n, s) for n, s in plan.sites.items() if s.group == "query_key" and "attn1" in n)
    merged = {
        "Name": "__myl_FcMul_myl0_7",
        "Metadata": f"[ONNX Layer: {site.path}.to_q/MatMul]\x1f[ONNX Layer: {site.path}.to_k/MatMul]",
        "Inputs": [{"Name": "x", "Dimensions": [128, 32]}],
        "Outputs": [{"Name": "y", "Dimensions": [128, 2, site.rank]}],
    }
    layers = dims_by_node({"Layers": ["a name alone", merged, {"Name": "reshape", "Inputs": [], "Outputs": []}]})
    rows = {(row["site"], row["layer"]): row["ok"] for row in compare_layers(layers, plan)}
    assert rows[name, "to_q"] is True and rows[name, "to_k"] is True
    assert {ok for (at, _), ok in rows.items() if at != name} == {None}
    plan.sites[name].rank = 24
    assert {row["ok"] for row in compare_layers(layers, plan) if row["site"] == name} == {False}

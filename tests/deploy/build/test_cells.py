"""A recipe's matrix: the same slim model for several targets, shapes and precisions, built apart from one another."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest

import deploy
from deploy.artifacts import build_folder
from deploy.build import cells
from deploy.build.cells import CellWorkshop, build_cells, cells_of, recipe_of
from deploy.build.cluster import check_reachable
from deploy.build.stages import Done
from deploy.build.workshop import Workshop
from deploy.cli.app import main
from deploy.recipe.recipe import make_recipe
from exporters.engine.check import check_engine
from exporters.engine.gpu import Gpu
from slimdiff import InputError


def recipe_with(matrix: dict):
    return make_recipe({"model": "demo", "engine": {"batch": 4}, "matrix": matrix}, "recipe.yaml", Path())


def test_cells_are_all_combinations():
    recipe = recipe_with({"targets": ["openvino", "sm89"], "shapes": ["512x768", "4x64x64"], "precision": ["fp16"]})
    assert [cell.name for cell in cells_of(recipe)] == [
        "openvino-1x512x768-fp16",
        "openvino-4x64x64-fp16",
        "sm89-1x512x768-fp16",
        "sm89-4x64x64-fp16",
    ]
    graph, *_, engine = cells_of(recipe)
    found = recipe_of(recipe, graph)
    assert (found.compare.sampling.height, found.compare.sampling.width) == (512, 768)
    assert found.export.precision == "fp16" and not found.engine.enabled
    built = recipe_of(recipe, engine).engine
    assert (built.backend, built.targets, built.batch) == ("tensorrt-rtx", ["sm89"], None)
    assert cells_of(make_recipe({"model": "demo"}, "recipe.yaml", Path())) == []


@pytest.mark.parametrize(
    ("matrix", "told"),
    [
        ({}, "the key 'shapes' is missing"),
        ({"shapes": []}, "shapes"),
        ({"shapes": ["512"]}, "such as 512x512"),
        ({"shapes": ["512x500"]}, "multiple of 8"),
        ({"shapes": ["64x64", "1x64x64"]}, "the same is there twice"),
        ({"shapes": ["64x64"], "targets": ["tpu"]}, "a target is a GPU such as sm89, or one of onnxruntime"),
        ({"shapes": ["64x64"], "precision": ["fp8"]}, "fp16"),
        ({"shapes": ["64x64"], "cells": 3}, "unknown key 'cells'"),
    ],
)
def test_what_is_no_matrix(matrix, told):
    with pytest.raises(InputError, match=told):
        recipe_with(matrix)


def build(workspace: Path, folder: Path, matrix: str, capsys, *flags: str, code: int = 0) -> dict:
    (workspace / "matrix.yaml").write_text((workspace / "recipe.yaml").read_text() + f"matrix: {matrix}\n")
    assert main(["build", str(workspace / "matrix.yaml"), "--out", str(folder), "--json", *flags]) == code
    seen = capsys.readouterr()
    return json.loads(seen.out) if code == 0 else {"told": seen.err}


def made(whole: dict) -> list[str]:
    return [stage["name"] for stage in whole["stages"] if not stage["reused"]]


def test_a_cell_is_built_from_the_slim_model_that_is_there(built, workspace, tmp_path, capsys):
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: engines need the extra tensorrt-rtx")
    folder = shutil.copytree(built, tmp_path / "build")
    matrix = "{targets: [sm89], shapes: [2x16x16]}"
    whole = build(workspace, folder, matrix, capsys)
    name = "cells/sm89-2x16x16-fp32"
    assert made(whole) == [f"{name}/export", f"{name}/engine", f"{name}/validate", "report"]
    report = check_engine(folder / name / "engine", gpu=lambda: Gpu("a GPU", "sm89", "580.65"))
    assert report["precision"] == "fp32" and report["inputs"][0]["shape"] == [4, 4, 8, 8]
    (cell,) = whole["cells"]
    assert cell["parity"]["passed"] and (cell["target"], cell["images"]) == ("sm89", 2)
    assert "parity/sm89-2x16x16-fp32" in {gate["gate"] for gate in whole["gates"]}
    shutil.rmtree(folder / name / "validate")  # as if the build had been killed before
    assert made(build(workspace, folder, matrix, capsys)) == [f"{name}/validate"]
    assert made(build(workspace, folder, matrix, capsys)) == []


def test_away_from_here_cells_are_not_timed_and_errors_come_back(tmp_path, monkeypatch):
    """What Ray does, jobs and results pickled, in this process; `bench` is forced, too."""
    ran = []

    def run_stages(shop, stages, force):
        ran.append((shop.cell.name, [stage.name for stage in stages], force))
        if shop.cell.shape.images == 2:
            raise InputError("too large")
        return [Done(stage.name, "key", 1.0, reused=False) for stage in stages]

    def run_on_ray(function, jobs, address):
        return [pickle.loads(pickle.dumps(function(job))) for job in pickle.loads(pickle.dumps(jobs))]

    monkeypatch.setattr(cells, "run_stages", run_stages)
    monkeypatch.setattr(cells, "run_on_ray", run_on_ray)
    whole = Workshop(recipe_with({"shapes": ["2x16x16", "16x16"]}), tmp_path / "build")
    shops = [CellWorkshop(cell, whole, {"plan", "bench"}) for cell in cells_of(whole.recipe)]
    done = build_cells(whole, shops, "key", "local")
    large, small = (shop.cell.name for shop in shops)
    assert [next(done).name for _ in range(3)] == [f"cells/{small}/{s}" for s in ("export", "validate", "bench")]
    with pytest.raises(InputError, match=f"cell {large}: too large"):
        next(done)
    assert ran == [
        (large, ["export", "validate"], []),
        (small, ["export", "validate"], []),
        (small, ["export", "validate", "bench"], ["bench"]),
    ]


def test_without_ray_it_is_named(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    told = build(workspace, tmp_path / "build", "{shapes: [16x16]}", capsys, "--ray", code=3)["told"]
    assert "pip install 'slimdiff[ray]'" in told and not (tmp_path / "build").exists()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://localhost:{port}", "localhost:99999", "nowhere.invalid:1"]
)
def test_where_no_cluster_is(address):
    """Ray itself would wait for it for minutes; no cluster is needed to say so."""
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        where = address.format(port=bound.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(InputError, match="nothing answers there"):
            check_reachable(where)
    assert time.monotonic() - start < 30


def test_where_a_cluster_may_be():
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_reachable(f"ray://127.0.0.1:{server.getsockname()[1]}")
    check_reachable("local")
    check_reachable("auto")


@pytest.mark.slow
@pytest.mark.parametrize("ray", [False, True])
def test_cells_are_independent(built, workspace, tmp_path, capsys, ray):
    """One that cannot be built keeps none of the others back; all of them go into a server's bundle."""
    if ray:
        pytest.importorskip("ray", reason="ray is an extra")
    folder = shutil.copytree(built, tmp_path / "build")
    flags = ["--ray"] if ray else []
    matrix = "{{targets: [{}onnxruntime, sm89], shapes: [16x16, 16x24], precision: [fp32]}}"
    told = build(workspace, folder, matrix.format("sm999, "), capsys, *flags, code=2)["told"]
    assert "cell sm999-1x16x16-fp32: " in told and "has no target sm999" in told and "1 more" in told
    finished = {p.name for p in (folder / build_folder.CELLS).iterdir() if (p / "validate").is_dir()}
    assert finished == {f"{target}-1x{size}-fp32" for target in ("onnxruntime", "sm89") for size in ("16x16", "16x24")}
    whole = build(workspace, folder, matrix.format(""), capsys, *flags)
    assert made(whole) == ["report"] and len(whole["cells"]) == 4
    assert all(("speedup" in cell) == (cell["target"] == "onnxruntime") for cell in whole["cells"])
    argv = ["bundle", str(folder), "--target", "server", "--out", str(tmp_path / "server"), "--json"]
    assert main(argv) == 0
    value = json.loads(capsys.readouterr().out)
    shapes = [(d["width"], bool(d["capabilities"]), d["vae"]) for d in value["denoisers"]]
    assert sorted(shapes) == [
        (16, False, "."),
        (16, True, "."),
        (24, False, "sizes/8x12"),
        (24, True, "sizes/8x12"),
    ]
    pipeline = deploy.load(tmp_path / "server", "onnxruntime", width=24, threads=1)
    assert pipeline("a red circle", height=16, width=24, num_inference_steps=2).images[0].size == (24, 16)

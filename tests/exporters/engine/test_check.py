"""An engine is checked before it is opened: files, version, GPU, shapes."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from exporters.engine.check import check_engine, choose_profile, runs_on
from exporters.engine.gpu import Gpu
from exporters.engine.shapes import engine_shapes
from exporters.settings import EngineSettings, ShapeRange
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.storage import manifest

ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", "580.65.06")
BLACKWELL = Gpu("NVIDIA GeForce RTX 5090", "sm120", "580.65.06")
ENDS = ("min", "opt", "max")


def ada():
    return ADA


@pytest.fixture
def folder(slim_engine, tmp_path):
    """A copy of a real engine that a test may change."""
    return shutil.copytree(slim_engine[0], tmp_path / "engine")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(folder, **changes):
    """The engine as it would be if it had been built otherwise."""
    report = json.loads((folder / "engine.json").read_text())
    report["parts"] |= changes.pop("parts", {})
    report |= changes
    report["key"] = manifest.fingerprint(report["parts"])
    (folder / "engine.json").write_text(json.dumps(report))
    manifest.write_manifest(folder, "engine", {}, runs_on(report))


def test_an_engine_for_the_gpu_here_is_fine(folder, slim_engine):
    assert check_engine(folder, gpu=ada) == slim_engine[1]


def test_without_a_gpu_nothing_is_opened(folder):
    with pytest.raises(MissingPackageError, match="runs on sm89, and there is no GPU here.*ONNX"):
        check_engine(folder, gpu=lambda: None)


def test_an_engine_for_another_gpu_is_refused(folder):
    with pytest.raises(InputError, match=r"built for sm89, and .*5090 \(sm120\): build it with --target sm120"):
        check_engine(folder, gpu=lambda: BLACKWELL)
    rewrite(folder, parts={"runs_on": {"gpu": vars(BLACKWELL)}})
    with pytest.raises(InputError, match=r"built for NVIDIA GeForce RTX 5090 \(sm120\), and here is .*4090 \(sm89\)"):
        check_engine(folder, gpu=ada)
    assert check_engine(folder, gpu=lambda: BLACKWELL)


def test_an_engine_of_another_version_is_refused(folder, slim_engine):
    rewrite(folder, parts={"versions": {"tensorrt-rtx": "1.2.0.54"}})
    here = slim_engine[1]["version"]
    with pytest.raises(
        InputError, match=f"built with tensorrt-rtx 1.2.0.54, and {here} is installed.*build the engine"
    ):
        check_engine(folder, gpu=ada)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_a_missing_backend_is_named_with_its_extra(folder):
    rewrite(folder, backend="tensorrt", parts={"versions": {"tensorrt": "10.13.3.9"}})
    with pytest.raises(
        MissingPackageError, match=r"tensorrt 10.13.3.9, and tensorrt is not installed.*slimdiff\[gpu\]"
    ):
        check_engine(folder, gpu=ada)


def test_an_engine_built_before_opens_unless_it_has_no_weights(folder, slim_engine):
    options = {"workspace_gib": None, "tf32": False, "timing_cache": True}
    rewrite(folder, parts={"options": options | {"strip_weights": False}})
    assert check_engine(folder, gpu=ada)["key"] != slim_engine[1]["key"]
    rewrite(folder, parts={"options": options | {"strip_weights": True}})
    with pytest.raises(InputError, match=r"has no weights \(strip_weights\): such engines are no longer opened"):
        check_engine(folder, gpu=ada)


def test_a_changed_or_swapped_engine_is_refused(folder):
    engine = folder / "model.engine"
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    with pytest.raises(InputError, match="model.engine is not the file that the manifest describes"):
        check_engine(folder, gpu=ada)
    engine.write_bytes(b"another engine")
    with pytest.raises(InputError, match="model.engine is not the file"):
        check_engine(folder, gpu=ada)
    engine.unlink()
    with pytest.raises(InputError, match="lacks model.engine"):
        check_engine(folder, gpu=ada)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["runs_on"].update(targets=["sm89", "sm120"]), "disagree on what the engine runs on"),
        (lambda m: m["runs_on"].update(version="9.9"), "disagree on what the engine runs on"),
        (lambda m: m["files"].pop("model.engine"), "does not list model.engine"),
        (lambda m: m["files"]["engine.json"].update(sha256="0" * 64), "engine.json is not the file"),
        (lambda m: m.update(kind="onnx"), "is 'onnx', not an engine"),
        (lambda m: m.update(schema=99), "schema 99"),
    ],
)
def test_a_tampered_manifest_is_refused(folder, change, told):
    edit(folder / "manifest.json", change)
    with pytest.raises(InputError, match=told) as refused:
        check_engine(folder, gpu=lambda: BLACKWELL)
    assert "\n" not in str(refused.value)


def test_a_report_that_does_not_go_with_its_key_is_refused(folder):
    edit(folder / "engine.json", lambda report: report["parts"]["runs_on"].update(targets=["sm120"]))
    report = json.loads((folder / "engine.json").read_text())
    manifest.write_manifest(folder, "engine", {}, runs_on(report))
    with pytest.raises(InputError, match="its key is not that of its parts"):
        check_engine(folder, gpu=lambda: BLACKWELL)


@pytest.mark.parametrize("place", [{"targets": "sm89"}, {}, {"gpu": "RTX 4090"}])
def test_a_report_that_says_nothing_of_where_it_runs_is_refused(folder, place):
    rewrite(folder, parts={"runs_on": place})
    with pytest.raises(InputError, match="does not go with itself"):
        check_engine(folder, gpu=ada)


def test_a_folder_that_is_not_ours_is_refused(tmp_path, exported):
    with pytest.raises(InputError, match="has no manifest.json"):
        check_engine(exported["slim"].parent, gpu=ada)
    (tmp_path / "engine.json").write_text('{"skipped": "no GPU"}')
    manifest.write_manifest(tmp_path, "engine", {})
    with pytest.raises(InputError, match="holds no engine"):
        check_engine(tmp_path, gpu=ada)


def test_shapes_that_it_was_not_built_for_are_refused(slim_engine):
    report = slim_engine[1]
    shapes = {"sample": [2, 4, 8, 8], "timestep": [], "encoder_hidden_states": (2, 7, 32)}
    assert choose_profile(report, shapes) == 0
    with pytest.raises(InputError, match="built for sample 2x4x8x8, not 4x4x8x8"):
        choose_profile(report, {**shapes, "sample": [4, 4, 8, 8]})
    with pytest.raises(InputError, match="has inputs sample, timestep, encoder_hidden_states; it was given sample"):
        choose_profile(report, {"sample": [2, 4, 8, 8]})


def ranged(*batches):
    """A report of an engine with a profile for each pair of least and largest batch, of two inputs and a scalar."""
    inputs = {
        "sample": ["batch", 4, 8, 8],
        "timestep": [],
        "text": ["batch", 7, 32],
    }
    profiles = [
        ShapeRange(**{end: {"sample": (n, 4, 8, 8)} for end, n in zip(ENDS, (low, low, high), strict=True)})
        for low, high in batches
    ]
    return {"parts": {"shapes": engine_shapes(inputs, EngineSettings(profiles=profiles))}}


def given(sample, text=None):
    return {"sample": (sample, 4, 8, 8), "timestep": (), "text": (sample if text is None else text, 7, 32)}


def test_a_profile_takes_what_lies_between():
    report = ranged((1, 4))
    for batch in (1, 3, 4):
        assert choose_profile(report, given(batch)) == 0
    for shape in ((5, 4, 8, 8), (2, 4, 16, 8), (2, 4, 8)):
        with pytest.raises(InputError, match="built for sample 1x4x8x8 to 4x4x8x8, not"):
            choose_profile(report, {**given(2), "sample": shape})


def test_the_first_profile_that_takes_all_inputs_is_chosen():
    report = ranged((1, 2), (2, 4), (8, 8))
    assert [choose_profile(report, given(batch)) for batch in (1, 2, 3, 4, 8)] == [0, 0, 1, 1, 2]
    with pytest.raises(InputError, match="1x4x8x8 to 2x4x8x8 or 2x4x8x8 to 4x4x8x8 or 8x4x8x8, not 6x"):
        choose_profile(report, given(6))
    with pytest.raises(InputError, match="no profile for all of them together"):
        choose_profile(report, given(1, text=8))
    assert choose_profile(report, given(2, text=4)) == 1  # the second input decides

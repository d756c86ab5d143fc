"""A model with a schedule is served by it, and its weights are on the disk once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused
from conftest import BOTH

from deploy.bundle.archive import unpack
from deploy.triton import TritonSettings, write_repository
from deploy.triton.server.text_to_image import Cancelled, TextToImage
from exporters.graphs.pipeline import example_call
from exporters.graphs.scheduled import export_scheduled
from exporters.settings import ExportSettings
from exporters.validation.parity import image_psnr
from slimdiff import Schedule, schedule_pipeline
from slimdiff.errors import InputError
from slimdiff.storage import manifest

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema is in the extra triton")

from triton_repository import Server, read_config  # noqa: E402

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def models(scheduled, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("triton") / "repository"
    files = write_repository(scheduled, out, TritonSettings(device="cpu", max_steps=20))
    assert files == sorted(p for p in out.rglob("*") if p.is_file())
    return out / "models"


@pytest.fixture
def served(models) -> tuple[Server, TextToImage]:
    server = Server(models)
    return server, TextToImage(models / "text_to_image" / "1" / "pipeline", server, max_steps=20)


def expected(pipeline, schedule: Schedule, steps: int, guidance: float = 4.0) -> np.ndarray:
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 16, "width": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(3)
    return schedule_pipeline(pipeline, schedule)(PROMPT, generator=generator, **options).images[0]


@pytest.mark.parametrize(
    ("steps", "guidance", "whole", "shallow"),
    [
        (6, 4.0, [2, 2, 1], [2, 1, 1]),
        (6, 1.0, [1, 1, 1], [1, 1, 1]),  # one branch, whatever the schedule says
        (12, 4.0, [2, 2, 1], [2, 2, 2, 2, 1, 1, 1, 1, 1]),
    ],
)
def test_a_prompt_becomes_the_image_of_the_schedule(served, pipeline, steps, guidance, whole, shallow):
    server, serves = served
    found = serves(PROMPT, seed=3, steps=steps, guidance=guidance)
    assert image_psnr(expected(pipeline, BOTH, steps, guidance), found / 255) >= 50
    assert (server.batches["unet"], server.batches["unet_shallow"]) == (whole, shallow)


def test_a_unet_in_parts_reuses_a_depth_too(scheduled, pipeline, tmp_path):
    folder = shutil.copytree(scheduled, tmp_path / "onnx", ignore=shutil.ignore_patterns("manifest.json", "unet"))
    export_scheduled(pipeline.unet, folder / "unet", example_call(pipeline), BOTH, ExportSettings(split=True))
    write_repository(folder, tmp_path / "out", TritonSettings(device="cpu"))
    server = Server(models := tmp_path / "out" / "models")
    serves = TextToImage(models / "text_to_image" / "1" / "pipeline", server)
    found = serves(PROMPT, seed=3, steps=6, guidance=4.0)
    assert image_psnr(expected(pipeline, BOTH, 6), found / 255) >= 50
    assert (server.batches["unet_step"], server.batches["unet_shallow"]) == ([2, 2, 1], [2, 1, 1])
    assert server.batches["unet_prompt"] == [2, 1]  # once for both branches, and once for the prompt alone
    step, shallow = (models / name / "1" / "model.onnx.data" for name in ("unet_step", "unet_shallow"))
    assert step.samefile(shallow)


def test_an_image_that_was_cancelled_leaves_nothing_behind(served, pipeline):
    _, serves = served
    asked = iter([False, True])
    with pytest.raises(Cancelled):
        serves("another picture", seed=5, steps=6, guidance=4.0, is_cancelled=lambda: next(asked))
    assert image_psnr(expected(pipeline, BOTH, 6), serves(PROMPT, seed=3, steps=6, guidance=4.0) / 255) >= 50


def test_both_models_share_batches_and_are_described(models):
    for name in ("unet", "unet_shallow"):
        config = read_config(models / name)
        assert config.max_batch_size == 8 and config.HasField("dynamic_batching")
    whole, shallow = (read_config(models / name) for name in ("unet", "unet_shallow"))
    kept = {spec.name: list(spec.dims) for spec in whole.output}["kept"]
    assert {spec.name: list(spec.dims) for spec in shallow.input}["kept"] == kept
    assert [spec.name for spec in shallow.output] == ["out_sample"]


def test_more_calls_than_the_schedule_can_have_are_refused(served, models, tmp_path):
    folder = shutil.copytree(models / "text_to_image" / "1" / "pipeline", tmp_path / "pipeline")
    table = json.loads((folder / "schedule.json").read_text())
    assert set(table["calls"]) == {str(n) for n in range(1, 2 * 20 + 13)}
    table["calls"].pop("5")
    (folder / "schedule.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="the schedule says nothing of 5 calls"):
        TextToImage(folder, served[0])(PROMPT, steps=5)


def test_a_repository_has_its_weights_once(models, scheduled):
    data = [folder / "1" / "model.onnx.data" for folder in (models / "unet", models / "unet_shallow")]
    assert data[0].samefile(data[1])
    there = scheduled / "unet" / "model.onnx.data"
    assert (
        not data[0].samefile(there) and data[0].read_bytes() == there.read_bytes()
    )  # of two artifacts, each has its own


def on_disk(folder: Path) -> int:
    """Bytes of the files of a folder, those of several names once."""
    files = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    return sum(files.values())


def test_a_servers_bundle_has_its_weights_once(scheduled, tmp_path, capsys):
    pytest.importorskip("zstandard", reason="archives need the extra bundle")
    argv = ["bundle", scheduled, "--target", "server", "--out"]
    call([*argv, tmp_path / "plain"], capsys)
    call([*argv, tmp_path / "served", "--triton", "--archive", "tar.zst"], capsys)
    weights = sum(file.stat().st_size for file in (tmp_path / "plain").rglob("*.data"))
    more = on_disk(tmp_path / "served") - on_disk(tmp_path / "plain")
    assert 0 < more < 0.2 * weights
    data = [file for file in (tmp_path / "served").rglob("*.data")]
    assert len(data) > len({file.stat().st_ino for file in data}) == len(list((tmp_path / "plain").rglob("*.data")))
    archive = unpack(next(tmp_path.glob("served*.tar.zst")), tmp_path / "unpacked")
    manifest.verify_manifest(archive, exact=True)
    assert on_disk(archive) <= on_disk(tmp_path / "served")
    assert Schedule.load(archive) == BOTH and (archive / "triton" / "models" / "unet_shallow").is_dir()


def test_what_cannot_follow_the_schedule_is_not_served(scheduled, tmp_path, capsys):
    broken = shutil.copytree(scheduled, tmp_path / "broken")
    (broken / manifest.MANIFEST).unlink()
    (broken / "unet" / "shallow.onnx").unlink()
    with pytest.raises(InputError, match="has no shallow.onnx, and the schedule reuses up_blocks.2"):
        write_repository(broken, tmp_path / "out")
    argv = ["bundle", broken, "--target", "server", "--triton", "--out", tmp_path / "served"]
    assert "has no shallow.onnx" in refused(argv, capsys)
    assert not (tmp_path / "served").exists()

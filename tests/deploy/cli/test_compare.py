"""`compare`: any two artifacts, folders of images, metrics on one's own checkpoint."""

from __future__ import annotations

import pytest
from command_line import call, refused
from PIL import Image

from deploy.cli.app import main
from slimdiff.storage import manifest

FEW = ["--images", 2, "--trajectories", 1, "--steps", 2, "--batch", 1]


@pytest.fixture(scope="module")
def models(pipeline, slim_directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pipeline.save_pretrained(folder / "dense")
    return folder / "dense", slim_directory


def test_images_are_saved_where_other_tools_take_them(models, tmp_path, capsys):
    out = tmp_path / "pairs"
    found = call(["compare", *models, *FEW, "--save-images", out], capsys)
    names = ["00000.png", "00001.png"]
    assert [sorted(f.name for f in (out / side).iterdir()) for side in ("dense", "slim")] == [names, names]
    assert len((out / "captions.txt").read_text().splitlines()) == 2 and found["saved"] == str(out)
    manifest.verify_manifest(out)
    metrics = found["images"]["metrics"]
    assert metrics["psnr"]["value"] == pytest.approx(found["images"]["psnr_db"])
    assert metrics["ssim"]["low"] <= metrics["ssim"]["value"] <= metrics["ssim"]["high"]
    # Again in the place of what is ours, and not in that of anything else.
    (out / "notes.txt").write_text("mine")
    line = refused(["compare", *models, *FEW, "--save-images", out], capsys)
    assert f"--save-images {out} holds notes.txt, which slimdiff did not write" in line
    line = refused(["compare", *models, *FEW, "--save-images", models[0]], capsys)
    assert "--save-images" in line and "is read" in line


def test_metrics_are_measured_with_weights_by_path(models, tmp_path, capsys, weights):
    real = tmp_path / "real"
    real.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 9)).save(real / f"{number}.jpg")
    asked = [f"{name}={weights[file]}" for name, file in (("fid", "inception"), ("clip", "clip"))]
    flags = [part for said in asked for part in ("--weights", said)]
    found = call(["compare", *models, *FEW, "--metrics", "fid,clip", *flags, "--reference", real], capsys)
    assert found["quality"].keys() == {"fid", "clip"}
    assert found["quality"]["fid"]["reference"] == 3
    for metric in found["quality"].values():
        assert {"dense", "slim", "difference", "low", "high", "unit", "better", "count"} <= metric.keys()


def test_a_bound_that_does_not_hold_is_an_exit_code(models, capsys):
    gates = ["--gate", "max_noise_error=100", "--gate", "min_ssim=1e-9"]
    found = call(["compare", *models, *FEW, *gates], capsys)
    assert found["verdict"] == "pass" and [g["gate"] for g in found["gates"]] == ["noise_error", "ssim"]
    found = call(["compare", *models, *FEW, *gates, "--gate", "min_psnr_db=900"], capsys, 1)
    assert found["verdict"] == "fail"
    assert [g["verdict"] for g in found["gates"]] == ["pass", "fail", "pass"]
    assert found["gates"][1]["value"] == found["images"]["psnr_db"] < found["gates"][1]["bound"]
    assert main(["compare", *map(str, (*models, *FEW)), "--gate", "max_quality_loss=1"]) == 4
    assert "gate quality_loss: not measured, bound 1: inconclusive" in capsys.readouterr().out


REFUSED = {
    "no gate": (["--gate", "lpips=0.1"], "'lpips' is none of max_quality_loss, max_noise_error, min_psnr_db, min_ssim"),
    "a gate of a build": (["--gate", "min_speedup=2"], "'min_speedup' is none of"),
    "no bound": (["--gate", "min_ssim"], "--gate min_ssim=: input should be a valid number"),
    "a bound beyond": (["--gate", "min_ssim=2"], "--gate min_ssim=2: input should be less than or equal to 1"),
    "two bounds": (["--gate", "min_ssim=0.1", "--gate", "min_ssim=0.2"], "'min_ssim' is there twice"),
    "a gate of no metric": (["--gate", "max_lpips=1"], "max_lpips is of lpips, which is not measured"),
    "unknown": (["--metrics", "psnr,beauty"], "there is no metric 'beauty': metrics are psnr, ssim"),
    "no weights": (["--metrics", "lpips"], "lpips needs weights, which are never fetched: give --weights lpips=PATH"),
    "not asked for": (["--weights", "clip=folder"], "does not ask for: add clip there"),
    "no name": (["--metrics", "clip", "--weights", "folder"], "--weights folder: write NAME=PATH"),
    "twice": (["--metrics", "clip", "--weights", "clip=a", "--weights", "clip=b"], "--weights clip is there twice"),
    "not there": (["--metrics", "clip", "--weights", "clip=none"], "--weights clip=PATH: there is no none"),
    "needless reference": (["--reference", "."], "a reference folder is for fid and kid"),
    "too small": (["--metrics", "ms_ssim"], "ms_ssim needs images of at least 161 pixels a side"),
    "a runtime of models": (["--runtime", "openvino"], "is a model in torch: export it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_long_work(case, models, capsys, monkeypatch):
    from slimdiff import fidelity

    monkeypatch.setattr(fidelity, "compare_noise", lambda *_: pytest.fail("the long work began"))
    flags, said = REFUSED[case]
    assert said in refused(["compare", *models, *FEW, *flags], capsys)


def test_models_of_other_shapes_or_sizes_are_refused(models, pipeline, tmp_path, capsys):
    from conftest import tiny_pipeline

    tiny_pipeline(sample_size=16).save_pretrained(tmp_path / "large")
    line = refused(["compare", models[0], tmp_path / "large", *FEW], capsys)
    assert "make images of 16 x 16 and 32 x 32, which cannot be compared" in line
    line = refused(["compare", models[0], "demo", *FEW], capsys)
    assert "they are no two forms of one model" in line


def test_a_slim_model_is_compared_with_its_graph(models, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    onnx = tmp_path / "onnx"
    assert main(["export", str(models[1]), "--out", str(onnx), "--quiet"]) == 0
    capsys.readouterr()
    short = tmp_path / "prompts.txt"  # the graph takes 40 tokens, and the tokenizer has letters for most words
    short.write_text("a circle\na star\n")
    for pair in ((models[1], onnx), (onnx, onnx / "unet")):
        rest = ["--pipeline", models[1]] * (pair[1].name == "unet")
        found = call(["compare", *pair, "--prompts", short, *FEW, *rest], capsys)
        assert found["noise_error"]["relative_mse"] < 1e-8
        assert found["images"]["psnr_db"] is None or found["images"]["psnr_db"] > 40


@pytest.mark.slow
def test_a_model_makes_images_of_its_graphs_size_and_a_bundle_is_compared_too(models, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
    onnx, edge = tmp_path / "onnx", tmp_path / "edge"
    call(["export", models[1], "--out", onnx, "--height", 32, "--width", 32], capsys)
    call(["bundle", onnx, "--target", "edge", "--out", edge], capsys)
    out = tmp_path / "pairs"
    found = call(["compare", models[1], onnx, *FEW, "--save-images", out], capsys)
    assert found["noise_error"]["relative_mse"] < 1e-8
    found = call(["compare", models[1], edge, *FEW, "--runtime", "onnxruntime"], capsys)
    assert found["noise_error"]["relative_mse"] < 1e-8
    assert Image.open(out / "dense" / "00001.png").size == (32, 32)
    line = refused(["compare", onnx / "unet", onnx / "unet", *FEW], capsys)
    assert "is a denoiser alone: say with --pipeline" in line

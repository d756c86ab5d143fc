"""Each metric on images of which its value is known."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from conftest import PROMPTS
from PIL import Image
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from deploy.artifacts.hashes import content_hash
from deploy.quality import distances, folders, intervals
from deploy.quality.measure import Measures
from deploy.quality.metrics import METRICS
from slimdiff.errors import InputError
from slimdiff.fidelity import image_fidelity
from slimdiff.storage import manifest

CAPTIONS = PROMPTS * 2


def pictures(count=8, noise=0, side=40, seed=0):
    """Random images; with `noise`, the same ones with as many steps of noise on each pixel."""
    base = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3))
    moved = base + np.random.default_rng(seed + 1).integers(-noise, noise + 1, base.shape)
    return [Image.fromarray(image) for image in moved.clip(0, 255).astype(np.uint8)]


def measure(weights, dense, slim, reference=None):
    weights = {name: str(path) if path else None for name, path in weights.items()}
    return Measures(weights, reference, count=len(slim))(dense, slim, CAPTIONS)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_is_zero_for_equal_images_symmetric_and_grows_with_noise(weights, net):
    distance = METRICS["lpips"].open(weights[net])
    [image], [near], [far] = pictures(1), pictures(1, 8), pictures(1, 100)
    assert distance(image, image) == 0
    assert 0 < distance(image, near) < distance(image, far)
    assert distance(image, far) == pytest.approx(distance(far, image), rel=1e-5)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_runs_on_the_weights_of_the_file(weights, net, tmp_path):
    import safetensors.torch as files

    state = files.load_file(weights[net]) if net == "squeeze" else torch.load(weights[net])
    files.save_file({k: torch.zeros_like(v) for k, v in state.items()}, tmp_path / "zero.safetensors")
    [image], [far] = pictures(1), pictures(1, 100)
    assert METRICS["lpips"].open(tmp_path / "zero.safetensors")(image, far) == 0


def test_psnr_and_ssim_are_the_figures_of_the_comparison_itself():
    dense, slim = pictures(), pictures(noise=20)
    images = measure({"psnr": None, "ssim": None}, dense, slim)["images"]
    figures = image_fidelity(dense, slim)
    assert images["psnr"]["value"] == pytest.approx(figures["psnr_db"]) and images["psnr"]["unit"] == "dB"
    assert images["ssim"]["value"] == pytest.approx(figures["ssim"]) and images["ssim"]["count"] == 8
    for metric in images.values():
        assert metric["low"] < metric["value"] < metric["high"]


def test_ms_ssim_is_one_for_equal_images_and_falls_with_noise():
    similarity = METRICS["ms_ssim"].open(None)
    [image], [near], [far] = (pictures(1, noise, 176) for noise in (0, 20, 120))
    assert similarity(image, image) == pytest.approx(1)
    assert 1 > similarity(image, near) > similarity(image, far)


def test_clip_judges_each_side_by_the_angle_of_image_and_caption(weights):
    dense, slim = pictures(), pictures(seed=5)
    score = measure({"clip": weights["clip"]}, dense, slim)["quality"]["clip"]
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(weights["clip"])
    processor = CLIPProcessor.from_pretrained(weights["clip"])
    with torch.no_grad():
        out = model(**processor(text=CAPTIONS, images=slim, return_tensors="pt", padding=True))
    cosines = (out.image_embeds * out.text_embeds).sum(-1)  # of length 1
    assert score["slim"] == pytest.approx(float(100 * cosines.clamp(min=0).mean()), abs=1e-3)
    assert score["difference"] == pytest.approx(score["slim"] - score["dense"])
    assert score["low"] <= score["difference"] <= score["high"]
    same = measure({"clip": weights["clip"]}, dense, dense)["quality"]["clip"]
    assert same["difference"] == same["low"] == same["high"] == 0


@pytest.mark.parametrize("features", ["inception", "clip"])
def test_fid_and_kid_are_zero_of_a_set_against_itself_and_say_their_features(weights, features):
    asked = {"fid": weights[features], "kid": weights[features]}
    images = measure(asked, pictures(), pictures())["images"]
    assert images["fid"]["value"] == pytest.approx(0, abs=1e-9) and images["fid"]["features"] == features
    # Unbiased: of a set and itself it is at most zero.
    assert images["kid"]["value"] <= 0


def test_fid_against_real_images_judges_each_side(weights, tmp_path):
    dense, slim = pictures(), pictures(noise=200)
    for number, image in enumerate(dense):
        image.save(tmp_path / f"{number}.png")
    asked = {"fid": weights["inception"], "kid": weights["inception"]}
    found = measure(asked, dense, slim, str(tmp_path))["quality"]
    assert found["fid"]["dense"] == pytest.approx(0, abs=1e-9) and found["fid"]["slim"] > 0
    for metric in found.values():
        assert metric["reference"] == 8 and metric["resamples"] == intervals.SET_RESAMPLES
        assert metric["low"] <= metric["difference"] <= metric["high"]


@pytest.mark.parametrize("count", [5, 40])  # fewer and more than features
def test_the_frechet_distance_is_that_of_torchmetrics(count):
    a, b = torch.randn(count, 8).double(), 2 * torch.randn(50, 8).double() + 1
    expected = float(_compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()))
    assert distances.frechet(distances.moments(a), distances.moments(b)) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_of_gaussians_has_its_closed_form():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    eye = torch.eye(3).double()
    one, other = distances.Moments(eye[0], 2 * eye), distances.Moments(3 * eye[1], 5 * eye)
    assert distances.frechet(one, other) == pytest.approx((1 + 9) + 3 * (5 - 2) ** 2)


def test_the_kernel_distance_is_that_of_torchmetrics():
    a, b = torch.randn(30, 8).double(), torch.randn(30, 8).double() + 1
    found = distances.kernel_distance(distances.kernel_sums(a), distances.kernel_sums(b))
    assert found == pytest.approx(float(poly_mmd(a, b)))


def test_intervals_hold_the_estimate_shrink_with_images_and_come_again():
    rng = np.random.default_rng(0)
    dense, noise = rng.normal(0, 10, 200), rng.normal(1, 0.1, 200)
    low, high = intervals.of_difference(dense, dense + noise)
    # Paired: the spread of the images, which is a hundred times larger, is not in it.
    assert low < float(noise.mean()) < high and high - low < 0.04
    assert intervals.of_difference(dense, dense + noise) == [low, high]
    few = intervals.of_mean(list(dense[:10]))
    assert few[1] - few[0] > 3 * np.subtract(*intervals.of_mean(list(dense))[::-1])


def test_one_image_has_no_interval():
    found = measure({"ssim": None}, pictures(1), pictures(1, 9))["images"]["ssim"]
    assert found["value"] < 1 and found["low"] is None and found["high"] is None


REFUSED = {
    "unknown": ({"sharpness": None}, "there is no metric 'sharpness': metrics are psnr, ssim, ms_ssim, lpips, clip"),
    "no weights": ({"lpips": None}, "lpips needs weights, which are never fetched: give --weights lpips=PATH"),
    "needless": ({"psnr": "x"}, "psnr needs no weights: leave out --weights psnr=PATH"),
    "not there": ({"clip": "no-such-folder"}, "--weights clip=PATH: there is no no-such-folder"),
    "another network": ({"lpips": "other.pth"}, "other.pth is no state of torchvision's AlexNet, VGG16"),
    "no weights file": ({"lpips": "odd.pth"}, "odd.pth cannot be read as weights"),
    "an empty file": ({"lpips": "empty.pth"}, "empty.pth cannot be read as weights: EOFError"),
    "text": ({"lpips": "text.pth"}, "text.pth cannot be read as weights"),
    "keys that are no names": ({"lpips": "numbers.pth"}, "numbers.pth holds no state of a module"),
    "no TorchScript": ({"fid": "odd.pth"}, "odd.pth is no TorchScript file"),
    "another TorchScript": ({"fid": "linear.pt"}, "linear.pt gives no features of images"),
    "no CLIP": ({"clip": "empty"}, "empty is no whole CLIP model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.pth").write_bytes(b"nothing")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_bytes(b"hello world")
    torch.save({0: torch.zeros(2)}, "numbers.pth")
    (tmp_path / "empty").mkdir()
    torch.save({"features.0.weight": torch.zeros(2, 2)}, "other.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save("linear.pt")
    weights, said = REFUSED[case]
    with pytest.raises(InputError) as refused:
        Measures(weights, count=8)(pictures(2), pictures(2), CAPTIONS)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_clip_model_without_all_its_weights_is_refused(weights, tmp_path):
    import safetensors.torch as files

    shutil.copytree(weights["clip"], tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    kept = {k: v for k, v in files.load_file(file).items() if not k.startswith("text_model.")}
    files.save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="its weights lack text_model.embeddings") as refused:
        Measures({"clip": str(tmp_path / "clip")}, count=8)
    assert "\n" not in str(refused.value)


def test_fid_of_fewer_images_than_features_is_said_to_be_biased(weights, caplog):
    measure({"fid": weights["inception"]}, pictures(8), pictures(8))
    assert "fid of 8 images by 12 features is biased upwards" in caplog.text
    caplog.clear()
    measure({"fid": weights["inception"]}, pictures(13), pictures(13))
    assert not caplog.text


def test_too_few_or_too_small_images_are_refused_before_there_are_any(weights):
    fid = {"fid": str(weights["inception"])}
    with pytest.raises(InputError, match="fid needs at least 2 images, and there are 1"):
        Measures(fid, count=1)
    with pytest.raises(InputError, match="ms_ssim needs images of at least 161 pixels a side, and these have 64"):
        Measures({"ms_ssim": None}, count=8, pixels=64)


def test_a_reference_that_cannot_be_read_is_refused(weights, tmp_path):
    fid = {"fid": str(weights["inception"])}
    with pytest.raises(InputError, match="there is no folder"):
        Measures(fid, str(tmp_path / "nowhere"), count=8)
    with pytest.raises(InputError, match="holds no reference images"):
        Measures(fid, str(tmp_path), count=8)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match="a.png cannot be read as a picture"):
        Measures(fid, str(tmp_path), count=8)
    with pytest.raises(InputError, match="a reference folder is for fid and kid"):
        Measures({"psnr": None}, str(tmp_path), count=8)


def test_figures_name_their_weights_and_their_reference_by_hash(weights, tmp_path):
    for number, image in enumerate(pictures(3, seed=7)):
        image.save(tmp_path / f"{number}.png")
    fid = {"fid": weights["inception"], "clip": weights["clip"], "ssim": None}
    found = measure(fid, pictures(3), pictures(3, noise=20), str(tmp_path))
    said = found["quality"]["fid"]["weights"]
    assert said == {"name": weights["inception"].name, "sha256": manifest.sha256_of(weights["inception"])}
    assert found["quality"]["clip"]["weights"]["sha256"] == content_hash(weights["clip"])
    assert found["quality"]["fid"]["reference_sha256"] == content_hash(tmp_path)
    assert "weights" not in found["images"]["ssim"]


def test_a_reference_folder_is_read_a_few_pictures_at_a_time(weights, tmp_path, monkeypatch):
    for number, image in enumerate(pictures(20, side=8)):
        image.save(tmp_path / f"{number:02d}.png")
    most = [0]
    features = METRICS["fid"].open(weights["inception"])

    class Counted(folders.Pictures):
        def __getitem__(self, at):
            found = super().__getitem__(at)
            most.append(len(found))
            return found

    monkeypatch.setattr(folders, "Pictures", Counted)
    streamed = features(folders.read_images(tmp_path, 2))
    assert torch.equal(streamed, features(pictures(20, side=8))) and 1 < max(most) <= 16

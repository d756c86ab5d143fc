"""A size is made as it is asked for, or refused at the door with the nearest right ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from command_line import call, refused
from every_pipeline.members import make_member
from families.images import unconditional, xl
from families.transformers import pixart
from families.videos import animate, image_to_video, text_to_video

from exporters.graphs.pipeline import example_call
from slimdiff import Budget, InputError, Sampling, compress
from slimdiff.denoising.sizes import check_size
from slimdiff.denoising.trajectory import record_calls, sample_images
from slimdiff.settings import CalibrationSettings


def test_one_given_side_means_a_square():
    assert Sampling(height=128).width == 128 and Sampling(width=64).height == 64
    assert (Sampling(height=8, width=16).height, Sampling().width) == (8, None)


@pytest.mark.parametrize("make", [xl, pixart, animate, text_to_video, image_to_video])
def test_every_family_names_its_nearest_sizes(make):
    pipeline = make()
    step = next(n for n in range(1, 1000) if not _fault(pipeline, height=n))
    assert step % pipeline.vae_scale_factor == 0
    assert _fault(pipeline, width=step + 1).endswith(f"multiples of {step}: give {step} or {2 * step}")
    assert step == 1 or _fault(pipeline, height=step - 1).endswith(f"give {step}")
    for size in (0, -8, 8.0, "8", True):
        assert "whole number of at least 1" in _fault(pipeline, height=size)


def _fault(pipeline, **sizes) -> str:
    try:
        check_size(pipeline, sizes)
    except InputError as error:
        return str(error)
    return ""


def test_a_pipeline_that_makes_its_own_size_of_an_area_gets_the_area_that_was_asked_for():
    kontext = make_member("FluxKontextPipeline")
    image = sample_images(kontext, ["a cat"], Sampling(steps=1, batch=1, height=32, width=16))[0]
    assert image.size == (16, 32)


def test_a_unet_that_does_not_resize_needs_its_down_scaling_and_patches_are_whole():
    def of(kind, **config):
        return SimpleNamespace(unet=type(kind, (), {"config": config})(), vae_scale_factor=8)

    assert "multiples of 32" in _fault(of("UNet2DModel", down_block_types=("a", "b", "c")), height=8)
    assert "multiples of 16" in _fault(of("DiTTransformer2DModel", patch_size=2), height=24)
    assert _fault(of("UNet2DConditionModel", down_block_types=("a", "b", "c")), height=8) == ""
    assert _fault(unconditional(), height=1) == "" or "multiples" in _fault(unconditional(), height=1)


def test_numbers_of_frames_are_those_that_the_vae_makes_and_the_motion_modules_take():
    video = SimpleNamespace(vae_scale_factor_temporal=4)
    assert _fault(video, num_frames=14).endswith("give 13 or 17") and _fault(video, num_frames=17) == ""
    assert "num_frames is a whole number of at least 1, not 0" in _fault(video, num_frames=0)
    assert "give at most" in _fault(animate(), num_frames=10_000)


def test_python_refuses_a_size_before_anything_is_run(pipeline):
    sampling = Sampling(steps=1, height=9)
    doors = (
        lambda: compress(pipeline, ["a"], Budget("8%"), calibration=CalibrationSettings(sampling=sampling)),
        lambda: example_call(pipeline, width=9),
        lambda: record_calls(pipeline, ["a"], sampling),
        lambda: sample_images(pipeline, ["a"], sampling),
        lambda: sample_images(pipeline, ["a"], Sampling(steps=1, arguments={"height": 9})),
    )
    for door in doors:
        with pytest.raises(InputError, match=r"(height|width) 9 is no size of StableDiffusionPipeline, .*: give \d+"):
            door()


@pytest.mark.parametrize(
    "argv", ["generate demo --prompt x --out x.png", "export demo --out x", "compress demo --out x --reduce 8%"]
)
def test_commands_refuse_a_size_with_the_nearest_ones(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "give 100 or 104" in refused([*argv.split(), "--height", "102"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_command_makes_a_square_of_one_side(tmp_path, capsys):
    argv = ["generate", "demo", "--prompt", "x", "--out", tmp_path / "x.png", "--steps", "1", "--height", "128"]
    made = call(argv, capsys)
    assert (made["height"], made["width"]) == (128, 128)

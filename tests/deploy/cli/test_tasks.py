"""Pipelines of every task on the command line: what their images are made from, beside prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused
from conftest import tiny_pipeline
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from families.family import picture
from families.images import inpainting, instruct_pix2pix, unconditional
from families.transformers import dit
from PIL import Image
from safetensors.torch import load_file

from deploy.recipe.material import parse_classes
from slimdiff.denoising.schedulers import make_scheduler
from slimdiff.denoising.tasks import neutral_inputs
from slimdiff.errors import InputError
from slimdiff.prompts.material import pair_masks
from slimdiff.settings import Sampling

STEPS = ["--steps", 2, "--guidance", 3]


TASKS = {
    "text to image": tiny_pipeline,
    "inpainting": inpainting,
    "InstructPix2Pix": instruct_pix2pix,
    "unconditional": unconditional,
    "class-conditional": dit,
}
NO_PROMPT = {"unconditional": [], "class-conditional": ["--classes", "3,1-2"]}
PICTURES = {
    "text to image": [],
    "image to image": ["images"],
    "inpainting": ["images", "masks"],
    "InstructPix2Pix": ["images"],
    "unconditional": [],
    "class-conditional": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of each task, and three pictures with their masks."""
    made = tmp_path_factory.mktemp("tasks")
    for name, make in TASKS.items():
        make().save_pretrained(made / name)
    for kind in ("images", "masks"):
        (made / kind).mkdir()
    for number in range(3):
        picture(number).save(made / "images" / f"{number}.png")
        mask = Image.fromarray(np.uint8(255 * (np.indices((16, 16))[0] > 7 + number)))
        mask.save(made / "masks" / f"{number}.png")
    (made / "prompts.txt").write_text("a red circle\na blue star\na green ring\n")
    return made


@pytest.mark.parametrize("task", PICTURES)
def test_a_task_is_calibrated_compressed_compared_and_run(task, folder, tmp_path, capsys):
    model, slim = folder / {"image to image": "text to image"}.get(task, task), tmp_path / "slim"
    prompts = NO_PROMPT.get(task, ["--prompts", folder / "prompts.txt"])
    folders = [part for name in PICTURES[task] for part in (f"--{name}", folder / name)]
    call(
        ["compress", model, "--out", slim, "--reduce", "4%", "--samples", 2, "--align", 4, *folders, *prompts, *STEPS],
        capsys,
    )
    classes = [json.loads((place / "model_index.json").read_text())["_class_name"] for place in (model, slim)]
    assert classes[0] == classes[1]
    inputs = [str(part).replace("--", "--input-") for part in folders]
    found = call(["compare", model, slim, "--images", 1, "--trajectories", 1, *inputs, *prompts, *STEPS], capsys)
    assert 0 < found["noise_error"]["relative_mse"] < 1
    one = [part for name in PICTURES[task] for part in (f"--{name[:-1]}", folder / name / "1.png")]
    said = [] if task in NO_PROMPT else ["--prompt", "a red circle"]
    said += ["--class", 1] * bool(NO_PROMPT.get(task))
    images = {}
    for name, more in (("own", []), ("seed", ["--seed", 1]), ("image", [])):
        flags = [str(part).replace("1.png", "2.png") for part in one] if name == "image" else one
        answer = call(["generate", slim, "--out", tmp_path / f"{name}.png", *flags, *said, *more, *STEPS], capsys)
        images[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    side = 8 if task == "unconditional" else 16
    assert (answer["width"], answer["height"]) == (side, side)
    assert (images["own"] != images["seed"]).any()
    assert (images["own"] != images["image"]).any() == bool(PICTURES[task])


def test_a_masked_image_keeps_what_is_not_painted(folder, tmp_path, capsys):
    """A text-to-image model inpaints by keeping the image's latents where the mask is black."""
    flags = ["--image", folder / "images/0.png", "--prompt", "a red circle", *STEPS, "--out", tmp_path / "a.png"]
    black = tmp_path / "black.png"
    Image.new("L", (16, 16)).save(black)
    answer = call(["generate", folder / "text to image", *flags, "--mask", black], capsys)
    assert answer["pipeline"] == "StableDiffusionInpaintPipeline"


def test_several_images_are_of_seeds_in_order_and_one_is_as_alone(folder, tmp_path, capsys):
    model = folder / "text to image"
    flags = ["--prompt", "a red circle", *STEPS, "--scheduler", "euler", "--negative-prompt", "blue"]
    several = call(["generate", model, *flags, "--count", 3, "--out", tmp_path / "x.png"], capsys)
    assert several["outs"] == [str(tmp_path / f"x-{i}.png") for i in range(3)]
    call(["generate", model, *flags, "--seed", 2, "--out", tmp_path / "alone.png"], capsys)
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "x-2.png").read_bytes()
    plain = [part for part in flags if part not in ("--negative-prompt", "blue")]
    call(["generate", model, *plain, "--seed", 2, "--out", tmp_path / "plain.png"], capsys)
    assert (tmp_path / "alone.png").read_bytes() != (tmp_path / "plain.png").read_bytes()


def test_a_long_prompts_end_counts(folder, tmp_path, capsys):
    """The tokenizer takes 40 tokens: diffusers would cut the words that differ."""
    start, images = "a large red circle top left, on a gray background, " * 5, []
    for end in ("a star", "a ring"):
        flags = ["--prompt", start + end, *STEPS, "--out", tmp_path / "a.png"]
        call(["generate", folder / "text to image", *flags], capsys)
        images.append((tmp_path / "a.png").read_bytes())
    assert images[0] != images[1]


PROMPT = ["--prompt", "a circle"]
REFUSALS = {
    "no prompt": (["text to image"], "makes images of prompts: say what to show"),
    "a prompt for none": (["unconditional", *PROMPT], "takes no prompt"),
    "a mask alone": (["text to image", *PROMPT, "--mask", "masks/0.png"], "give --image with it"),
    "classes for none": (["text to image", *PROMPT, "--class", "1"], "makes no images of classes"),
    "an odd class": (["text to image", *PROMPT, "--class", "one"], "classes are numbers such as 207"),
    "no picture": (["text to image", *PROMPT, "--image", "none.png"], "there is no such"),
    "a text for a picture": (["text to image", *PROMPT, "--image", "text.png"], "cannot be read as a picture"),
    "an image for none": (["unconditional", "--image", "images/0.png"], "makes no images from images"),
    "an odd size": (["text to image", *PROMPT, "--image", "odd.png"], "or say --height and --width"),
    "a mask of another size": (
        ["text to image", *PROMPT, "--image", "images/0.png", "--mask", "odd.png"],
        "odd.png is 15 x 9 and its image 16 x 16",
    ),
    "a picture of 16 bits": (["text to image", *PROMPT, "--image", "deep.png"], "more than 8 bits a channel (I;16)"),
    "a transparent picture": (["text to image", *PROMPT, "--image", "clear.png"], "is transparent in places"),
    "half a picture": (["text to image", *PROMPT, "--image", "half.jpg"], "cannot be read as a picture"),
    "a class beyond the last": (["class-conditional", "--class", "1000"], "has classes 0 to 999, and 1000 is asked"),
    "more classes than images": (["class-conditional", "--class", "1-3"], "--class names 3 classes for 1 images"),
    "an argument that is a flag": (
        ["text to image", *PROMPT, "--argument", "guidance_scale=0"],
        "guidance_scale is set by guidance",
    ),
    "a scheduler that is none": (["text to image", *PROMPT, "--scheduler", "fast"], "there is no scheduler 'fast'"),
    "a scheduler of other models": (
        ["text to image", *PROMPT, "--scheduler", "FlowMatchEulerDiscreteScheduler"],
        "DDIMScheduler cannot be exchanged for FlowMatchEulerDiscreteScheduler",
    ),
    "an argument that is none": (["text to image", *PROMPT, "--argument", "strenth=1"], "takes no strenth"),
    "a strength for none": (["text to image", *PROMPT, "--strength", "0.5"], "takes no strength"),
    "a strength beyond all": (["text to image", *PROMPT, "--strength", "1.5"], "is a number above 0 and up to 1"),
    "two strengths": (["text to image", *PROMPT, "--strength", "1", "--argument", "strength=1"], "give one of them"),
    "less than a step": (
        ["text to image", *PROMPT, "--image", "images/0.png", "--strength", "0.4"],
        "at strength 0.4 leaves not one of 2 steps: take 3 steps or more, or a strength of at least 0.5",
    ),
    "no argument": (["text to image", *PROMPT, "--argument", "strength"], "is like image_guidance_scale=2"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_made_is_one_line(case, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    picture(5).resize((15, 9)).save("odd.png")
    (folder / "text.png").write_text("no picture")
    Image.fromarray(np.full((16, 16), 20_000, dtype=np.uint16)).save("deep.png")
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save("clear.png")
    picture(5, 64).save("whole.jpg")
    Path("half.jpg").write_bytes(Path("whole.jpg").read_bytes()[:1000])
    flags, message = REFUSALS[case]
    assert message in refused(["generate", *flags, *STEPS, "--out", tmp_path / "a.png"], capsys)
    assert not (tmp_path / "a.png").exists()


def test_less_than_a_step_is_refused_before_calibration(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("slimdiff.denoising.trajectory.sample_batch", lambda *_, **__: pytest.fail("it began"))
    flags = ["--images", folder / "images", "--samples", 2, "--steps", 1, "--reduce", "4%", "--out", tmp_path / "slim"]
    line = refused(["compress", folder / "text to image", *flags], capsys)
    assert "at strength 0.8, its default, leaves not one of 1 steps: take 2 steps or more" in line


def test_strength_says_how_much_of_an_image_is_made_anew(folder, tmp_path, capsys):
    flags = [*PROMPT, *STEPS, "--image", folder / "images" / "0.png"]
    made = []
    for name, strength in (("a", ["--strength", 0.5]), ("b", ["--argument", "strength=0.5"]), ("c", ["--strength", 1])):
        call(["generate", folder / "text to image", *flags, *strength, "--out", tmp_path / f"{name}.png"], capsys)
        made.append((tmp_path / f"{name}.png").read_bytes())
    assert made[0] == made[1] != made[2]


MATERIAL = {
    "fewer images": (["--images", "images", "--samples", 4], "images holds 3 images, and 4 are asked for"),
    "no image": (["--images", "empty", "--samples", 1], "empty holds no images (such as .png or .jpg)"),
    "no folder": (["--images", "none", "--samples", 1], "none: there is no such file or folder of images"),
    "fewer masks": (["--images", "images", "--masks", "few", "--samples", 2], "1 masks for 3 images: 0.png, for one"),
    "masks alone": (["--masks", "masks"], "give --images with them"),
}


@pytest.mark.parametrize("case", MATERIAL)
def test_material_that_is_not_enough_is_one_line_before_the_model_is_loaded(
    case, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(folder)
    for name in ("empty", "few"):
        (folder / name).mkdir(exist_ok=True)
    picture(0).save(folder / "few" / "other.png")
    monkeypatch.setattr("slimdiff.loading.pipelines.load_component", None)
    flags, message = MATERIAL[case]
    assert message in refused(["compress", "inpainting", "--out", tmp_path / "slim", "--reduce", "4%", *flags], capsys)


def test_an_image_that_is_read_is_not_written_over(folder, tmp_path, capsys):
    picture(0).save(tmp_path / "x-0.png")
    before = (tmp_path / "x-0.png").read_bytes()
    flags = ["--image", tmp_path / "x-0.png", *PROMPT, *STEPS, "--count", 2, "--out", tmp_path / "x.png"]
    assert "--out" in refused(["generate", folder / "text to image", *flags], capsys)
    assert (tmp_path / "x-0.png").read_bytes() == before


def test_masks_go_by_name_for_all_images_or_by_order_for_all():
    images = [Path(f"images/{name}.png") for name in "abc"]
    by_name = [Path(f"masks/{name}.jpg") for name in "cba"]
    assert pair_masks(images, by_name) == by_name[::-1]
    by_order = [Path(f"masks/{number}.png") for number in range(3)]
    assert pair_masks(images, by_order) == by_order
    with pytest.raises(InputError, match="b.png has a mask of its name and a.png has none"):
        pair_masks(images, [Path(f"masks/{name}.png") for name in "bcd"])
    with pytest.raises(InputError, match="are masks of one name"):
        pair_masks(images, [*by_name, Path("masks/a.png")])


def test_a_task_of_a_half_checkpoint_leaves_its_dtypes_as_they_are(folder, tmp_path, capsys):
    half, slim = tmp_path / "half", tmp_path / "slim"
    tiny_pipeline().to(torch.float16).save_pretrained(half)
    flags = ["--images", folder / "images", "--prompts", folder / "prompts.txt", "--samples", 2, "--align", 4, *STEPS]
    call(["compress", half, "--out", slim, "--reduce", "4%", *flags], capsys)
    for part in ("unet", "vae", "text_encoder"):
        tensors = [tensor for file in (slim / part).glob("*.safetensors") for tensor in load_file(file).values()]
        assert tensors and {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}


def test_latents_are_not_clipped_by_a_scheduler_whose_settings_do_not_say():
    own = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    assert [make_scheduler(own, name).config.clip_sample for name in ("ddim", "ddpm", "lcm")] == [False] * 3
    assert make_scheduler(DDPMScheduler(), "ddim").config.clip_sample


def test_an_upscalers_size_is_that_of_its_images():
    class Upscaler:
        low_res_scheduler, vae_scale_factor = None, 4

        def __call__(self, prompt, image):
            """What it takes is all that counts."""

    (row,), sampling = neutral_inputs(Upscaler(), 1, Sampling(height=64, width=32))
    assert row["image"].size == (8, 16) and sampling.height is None


def test_classes_are_written_as_numbers_and_ranges():
    assert parse_classes("207") == [207] and parse_classes("1,3-5, 9") == [1, 3, 4, 5, 9]
    for text in ("", "a", "1-", "5-3", "1-2-3", "-1"):
        with pytest.raises(InputError):
            parse_classes(text)

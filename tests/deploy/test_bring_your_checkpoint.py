"""Each row of "Bring your checkpoint": a tiny member, from compress to generate on what is exported and bundled."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call
from conftest import tiny_pipeline
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler
from families import tasks
from families.family import TWO_LEVELS, picture
from families.images import inpainting, instruct_pix2pix, unconditional, xl
from families.original_layout import make_pipeline, original_tensors
from families.steering import make_adapter, make_controlnet, save_ip_adapter
from loras import peft_layout
from PIL import Image
from safetensors.torch import save_file

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-checkpoint.md"
FEW = ["--steps", 1, "--guidance", 0]
STEPS = ["--steps", 2, "--guidance", 3]
MORE = ("--steps", 4, "--guidance", 3)
PROMPTS = ["--prompts", "prompts.txt"]
PROMPT = ["--prompt", "a red circle"]
IMAGES, IMAGE = ["--images", "images"], ["--image", "images/1.png"]
MASKS, MASK = ["--masks", "masks"], ["--mask", "masks/1.png"]


@dataclass(frozen=True)
class Row:
    """What a row's member is, and what its commands take beside the places.

    Attributes:
        make: writes the member into a folder, and gives what the command line takes as MODEL.
        calibration, generation: flags of `compress` and of `generate`: what images are made of.
        usage: how many steps, at which guidance.
        said_once: `compress` alone is given the usage.
        compress, export: more flags of these commands.
        added: flags of what goes with the model in torch: for `export` and `validate`, and to run the slim model.
        samples: in a call of the graph, of one image.
        targets: of bundles.
        dense: nothing is compressed, as the row says.
        also: further members, by name.
    """

    make: Callable[[Path], Path]
    calibration: list[Any]
    generation: list[Any]
    samples: int = 2
    usage: tuple[Any, ...] = tuple(STEPS)
    said_once: bool = False
    compress: tuple[Any, ...] = ()
    export: tuple[Any, ...] = ()
    added: tuple[Any, ...] = ()
    targets: tuple[str, ...] = ("edge", "server")
    dense: bool = False
    also: dict[str, Callable[[Path], Path]] = field(default_factory=dict)


def directory(make: Callable[[], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        make().save_pretrained(folder / "model")
        return folder / "model"

    return write


def small() -> Any:
    return tiny_pipeline(**TWO_LEVELS)


def one_file(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(original_tensors(make_pipeline(kind)), folder / f"{kind}.safetensors")
        return folder / f"{kind}.safetensors"

    return write


def second() -> Any:
    """As Stable Diffusion 2: linear projections, heads of one size, v-prediction."""
    pipeline = tiny_pipeline(**{**TWO_LEVELS, "attention_head_dim": (1, 1)}, use_linear_projection=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = DDIMScheduler.from_config(config, prediction_type="v_prediction")
    return pipeline


def with_lora(folder: Path) -> Path:
    model = small()
    peft_layout(model, folder / "style.safetensors", lambda path: path.endswith(("to_q", "to_out.0")))
    return directory(lambda: model)(folder)


def steered(folder: Path) -> Path:
    """A model beside a ControlNet, a T2I-Adapter and an IP-Adapter of it."""
    model = small()
    save_ip_adapter(model.unet, folder / "ip")
    make_controlnet(model.unet).save_pretrained(folder / "edges")
    make_adapter((32, 32)).save_pretrained(folder / "adapter")
    return directory(lambda: model)(folder)


def turbo() -> Any:
    pipeline = small()
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    return pipeline


def lcm() -> Any:
    pipeline = tiny_pipeline(**TWO_LEVELS, time_cond_proj_dim=12)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


AT_16 = ("--height", 16, "--width", 16)
ROWS = {
    "text to image: Stable Diffusion 1.x, 2.x, XL": Row(
        directory(small), PROMPTS, PROMPT, also={"2.x": directory(second), "XL": directory(xl)}
    ),
    "the same, and an image (image to image)": Row(
        directory(small), PROMPTS + IMAGES, PROMPT + IMAGE, targets=("server",)
    ),
    "the same, an image and a mask": Row(
        directory(small), PROMPTS + IMAGES + MASKS, PROMPT + IMAGE + MASK, targets=("server",)
    ),
    "inpainting, with a UNet of 9 channels": Row(
        directory(inpainting), PROMPTS + IMAGES + MASKS, PROMPT + IMAGE + MASK
    ),
    "InstructPix2Pix": Row(directory(instruct_pix2pix), PROMPTS + IMAGES, PROMPT + IMAGE, samples=3),
    "SDXL's refiner": Row(directory(tasks.refiner), PROMPTS + IMAGES, PROMPT + IMAGE, usage=MORE),
    "upscaling: of images (x4), of latents": Row(
        directory(tasks.upscaler),
        [*PROMPTS, "--images", "small"],
        [*PROMPT, "--image", "small/1.png"],
        usage=MORE,
    ),
    "depth to image": Row(directory(tasks.depth_to_image), PROMPTS + IMAGES, PROMPT + IMAGE, usage=MORE),
    "latent diffusion (LDM)": Row(directory(tasks.ldm), PROMPTS, PROMPT),
    "unconditional (DDPM, DDIM)": Row(
        directory(unconditional), [], [], samples=1, also={"DDPM": directory(tasks.ddpm)}
    ),
    "class-conditional (consistency models)": Row(
        directory(tasks.consistency), ["--classes", "0-4"], ["--class", 3], samples=1, usage=("--steps", 2)
    ),
    "LCM, its guidance embedded": Row(directory(lcm), PROMPTS, PROMPT, samples=1),
    "Turbo, Lightning, Hyper": Row(directory(turbo), PROMPTS, PROMPT, samples=1, usage=tuple(FEW), said_once=True),
    "LoRA files": Row(with_lora, PROMPTS, PROMPT, compress=("--lora", "style.safetensors:0.8")),
    "ControlNet": Row(
        steered,
        PROMPTS,
        [*PROMPT, "--control-image", "images/0.png"],
        added=("--controlnet", "edges"),
    ),
    "T2I-Adapter": Row(
        steered,
        PROMPTS,
        [*PROMPT, "--control-image", "images/0.png"],
        added=("--adapter", "adapter"),
    ),
    "IP-Adapter": Row(
        steered,
        PROMPTS,
        [*PROMPT, "--ip-adapter-image", "images/0.png"],
        added=("--ip-adapter", "ip/ip-adapter.safetensors:0.6"),
        dense=True,
    ),
    "one `.safetensors` file of a whole model: SD 1.x, 2.x, XL, also inpainting": Row(
        one_file("sd1"),
        PROMPTS,
        PROMPT,
        compress=AT_16,
        export=AT_16,
        also={"2.x": one_file("sd2-v"), "XL": one_file("sdxl")},
    ),
    "the folder of a denoiser alone (`.../unet`)": Row(
        lambda folder: directory(small)(folder) / "unet", PROMPTS, PROMPT
    ),
}
QUICK = ("inpainting, with a UNet of 9 channels",)
"""What every run of the suite tries. The other rows, and further members, take as long each, and are marked slow."""
MEMBERS = [
    pytest.param(title, make, id=f"{title}{name}", marks=() if title in QUICK and not name else pytest.mark.slow)
    for title, row in ROWS.items()
    for name, make in {"": row.make, **{f": {name}": make for name, make in row.also.items()}}.items()
]


def titles() -> list[str]:
    """The first cells of the page's table."""
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row for row in rows if row != "you have" and not row.startswith("---")]


def test_every_row_of_the_page_is_tried():
    assert titles() == list(ROWS)


@pytest.mark.parametrize(("title", "make"), MEMBERS)
def test_a_row_goes_from_compress_to_generate(title, make, tmp_path, capsys, monkeypatch):
    """The slim model, its graphs and both bundles of them make the same image, within a rounding of its 8 bits."""
    row = ROWS[title]
    monkeypatch.chdir(tmp_path)
    write_material()
    model = make(tmp_path)
    usage = () if row.said_once else row.usage
    small = ("--reduce", "4%", "--samples", 2, "--align", 4, *row.usage, *row.compress)
    if row.dense:
        model.rename("slim")
    else:
        call(["compress", model, "--out", "slim", *row.calibration, *small], capsys)
    exported = call(["export", "slim", "--out", "onnx", *row.export, *row.added], capsys)
    assert exported["unet_inputs"]["sample"][0] == row.samples
    assert call(["validate", "slim", "onnx", "--steps", 4, "--calls", 2, *row.added], capsys)["passed"]
    for target in row.targets:
        call(["bundle", "onnx", "--target", target, "--out", target], capsys)
        asked = {flag for flag in _command(Path(target)) if flag.startswith("--")} - {"--out"}
        said = {str(flag) for flag in row.generation if str(flag).startswith("--")}
        assert asked == (said - {"--image", "--mask"} if title.startswith("the same") else said)  # which it can do, too
    images = {}
    for name in ("slim", "onnx", *row.targets):
        more = {"slim": (*row.export, *row.added), "edge": ("--runtime", "openvino-fp32")}.get(name, ())
        call(["generate", name, "--out", f"{name}.png", *row.generation, *usage, *more], capsys)
        images[name] = np.asarray(Image.open(f"{name}.png"), dtype=int)
    assert images["slim"].std() > 0
    assert {name: abs(image - images["slim"]).max() for name, image in images.items()} == pytest.approx(
        dict.fromkeys(images, 0), abs=1
    )


def _command(bundle: Path) -> list[str]:
    """What the bundle's README says to run."""
    (line,) = re.findall(r"^slimdiff generate .*", (bundle / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(line)


def write_material() -> None:
    """Prompts, and pictures with their masks, where the commands look for them."""
    Path("prompts.txt").write_text("a red circle\na blue star\n")
    for kind in ("images", "masks"):
        Path(kind).mkdir()
    Path("small").mkdir()
    for number in range(2):
        picture(number).save(f"images/{number}.png")
        picture(number, 8).save(f"small/{number}.png")
        Image.fromarray(np.uint8(255 * (np.indices((16, 16))[0] > 7 + number))).save(f"masks/{number}.png")

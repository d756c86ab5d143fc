"""Every command and every piece of Python of the README and of the task pages does what it says, in their order."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import tiny_pipeline
from diffusers import StableDiffusionInpaintPipeline
from families.family import picture
from families.original_layout import make_pipeline, original_tensors
from families.steering import make_controlnet
from loras import peft_layout
from safetensors.torch import save_file

from deploy.cli.app import main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
QUICK = """{reduce: 8%}
calibration: {samples: 4, sampling: {steps: 2, batch: 2}}
compare: {images: 2, shown: 1, trajectories: 1, sampling: {steps: 2, batch: 2}}
bench: {processes: 3, rounds: 3, warmup: 1}"""


@dataclass(frozen=True)
class Page:
    """A page, and what it takes for granted."""

    given: dict[str, str]
    """Models and builds by the page's names for them: `tiny`, `slim` or `build` of ours."""
    commands: int
    """At least so many."""
    sizes: dict[str, str] = field(default_factory=dict)
    """What is said of a checkpoint, and what to take for a model of no size."""


PAGES = {
    "README.md": Page(
        {"my-checkpoint": "tiny"},
        10,
        {
            "--reduce 100M": "--reduce 8% --samples 4 --steps 2",
            "{reduce: 12%}": QUICK,
            "[5%, 10%, 20%]": "[5%, 8%]",
            "min_speedup: 1.05": "min_speedup: 0.1",
            "512 --width 512": "16 --width 16",
        },
    ),
    "docs/slim-a-checkpoint.md": Page(
        {"my-checkpoint": "tiny"},
        8,
        {"--samples 64": "--samples 4 --steps 2", "{samples: 64}": "{samples: 4, sampling: {steps: 2, batch: 2}}"},
    ),
    "docs/bring-your-checkpoint.md": Page(
        {"my-checkpoint": "tiny", "my-turbo": "tiny", "my-inpainting": "inpainting"},
        9,
        {
            "--reduce 10%": "--reduce 5% --samples 2 --align 4",
            "--samples 32": "--steps 2",
            "sd15.safetensors --out": "sd15.safetensors --height 16 --width 16 --steps 2 --out",
            "512 --width 512": "16 --width 16",
            "1024 --width 1024": "32 --width 32",
        },
    ),
    "docs/schedule.md": Page(
        {"my-checkpoint": "tiny", "my-slim": "slim"},
        10,
        {
            "--samples 8": "--samples 2 --steps 4",
            "--macs 5%": "--macs 5% --samples 2 --align 4 --steps 4",
            "--speedup 1.05": "--speedup 1.001",
            "--deep-every 3": "--deep-every 3 --steps 6",
            "--images 8": "--images 2",
            "--of image --base": "--of image --steps 6 --processes 2 --rounds 3 --warmup 1 --base",
            "1.3 --of image --runtime onnxruntime": "1.02 --of image --schedule-images 1 --runtime torch --threads 1 "
            "--align 4 --samples 2 --steps 4",
        },
    ),
    "docs/build-engines.md": Page({"slim": "slim"}, 5),
    "docs/int8.md": Page({"my-checkpoint": "tiny"}, 10, {"--speedup 1.6": "--speedup 1.02 --samples 2 --steps 2"}),
    "docs/bundles.md": Page(
        {"my-checkpoint": "tiny", "my-slim": "slim", "my-build": "build"},
        10,
        {"{reduce: 12%}": QUICK, "[512x512, 4x512x512, 768x768]": "[16x16, 16x24]", "2x512x512": "2x16x16"},
    ),
}
COMMANDLESS = {"docs/index.md", "docs/api.md"}
"""Pages that send to others, and the API, which is made from the docstrings."""
ELSEWHERE = {
    "docs/gate-latency-in-ci.md": "cli/test_bench",
    "docs/serve-with-triton.md": "triton/test_triton",
    "docs/transformers.md": "cli/test_exported_transformers",  # and cli/test_offload
}
"""Pages whose commands the tests of their own matter run."""


def blocks(page: str) -> list[tuple[str, str]]:
    """The page's fenced blocks: language and text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for said, meant in {**PAGES[page].sizes, "100M": "8%", "50M": "4%"}.items():
        text = text.replace(said, meant)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_page_is_tried():
    assert {f"docs/{file.name}" for file in DOCS.glob("*.md")} | {"README.md"} == {*PAGES, *ELSEWHERE, *COMMANDLESS}
    for page, tests in ELSEWHERE.items():
        assert Path(page).name in (Path(__file__).parent / f"{tests}.py").read_text(encoding="utf-8")


def _bring(folder: Path) -> None:
    """An inpainting model, a ControlNet, pictures, masks and LoRA files, as people have them."""
    parts = tiny_pipeline(in_channels=9).components
    parts.pop("image_encoder", None)
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "inpainting")
    for name, mode in (("photo", "RGB"), ("mask", "L")):
        (folder / f"{name}s").mkdir()
        for number in range(2):
            picture(number).convert(mode).save(folder / f"{name}s" / f"{number}.png")
        picture(0).convert(mode).save(folder / f"{name}.png")
    picture(1).save(folder / "edges.png")
    make_controlnet(tiny_pipeline().unet).save_pretrained(folder / "my-controlnet")
    save_file(original_tensors(make_pipeline("sd1")), folder / "sd15.safetensors")
    for name in ("style", "detail", "other"):
        peft_layout(tiny_pipeline(), folder / f"{name}.safetensors", lambda path: path.endswith(("to_q", "to_out.0")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, workspace, tmp_path, monkeypatch, slim_directory, built):
    needed = ("onnxscript", "onnxruntime", "openvino", "tensorrt_rtx", "polygraphy", "tritonclient")
    for module in (*needed, *(["nncf"] if page == "docs/int8.md" else [])):
        pytest.importorskip(module, reason="needs the extras onnx, openvino, tensorrt-rtx, triton and int8")
    monkeypatch.chdir(tmp_path)
    if "inpainting" in PAGES[page].given.values():
        _bring(tmp_path)
    ours = {"inpainting": tmp_path / "inpainting", "tiny": workspace / "tiny", "slim": slim_directory, "build": built}
    for name, which in PAGES[page].given.items():
        shutil.copytree(ours[which], tmp_path / name)
    shutil.copy(workspace / "prompts.txt", tmp_path)
    found = blocks(page)
    for text in (text for language, text in found if language == "yaml"):
        name = re.match(r"# (\S+)\n", text)
        assert name is not None, "a YAML block begins with the name of its file"
        (tmp_path / name[1]).write_text(text)
    ran = 0
    for language, text in found:
        if language == "python":
            exec(text, {"prompts": ["a red circle", "a blue square"]})
        for line in text.replace("\\\n", " ").splitlines() if not language else ():
            command, *arguments = shlex.split(line, comments=True)
            if command in ("make", "pip"):  # `make` runs this
                continue
            assert command == "slimdiff", line
            if "--ray" in arguments and importlib.util.find_spec("ray") is None:
                continue
            # Which of two models of no size is the faster is for chance.
            assert main(arguments) in ((0, 1, 4) if arguments[0] == "bench" else (0,)), line
            ran += 1
    assert ran >= PAGES[page].commands

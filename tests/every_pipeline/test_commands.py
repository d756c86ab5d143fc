"""Every pipeline of diffusers before the commands: done and right, or one line and exit code 2 or 3."""

from __future__ import annotations

import inspect
import json
import re

import diffusers
import numpy as np
import pytest
from PIL import Image

from deploy.cli.app import main
from every_pipeline.members import CannotBeMadeError, make_member, parameters_of, pipeline_names

PROMPT = "a large red circle"
STEPS = ["--steps", "2", "--guidance", "3"]
DONE = {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentConsistencyModelPipeline"}
QUICK = {
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionUpscalePipeline",
}
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in pipeline_names()]


def run(capsys, *argv: object) -> int:
    """The exit code of a command that did not end well in more than a line, nor in a traceback."""
    capsys.readouterr()
    code = main([*map(str, argv), "--quiet"])
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not re.match(r"\[ *[0-9.]+ s\] warning: ", line)]
    assert code in (0, 2, 3), said.err
    assert len(lines) == (code != 0) and all(line.startswith("slimdiff: error: ") for line in lines), said.err
    return code


def same_image(one, other) -> bool:
    pixels = [np.asarray(Image.open(file), dtype=int) for file in (one, other)]
    return pixels[0].shape == pixels[1].shape and int(abs(pixels[0] - pixels[1]).max()) <= 2


@pytest.mark.parametrize("name", EVERY)
def test_commands_do_right_by_a_pipeline_or_say_why_not(name, tmp_path, capsys):
    try:
        member = make_member(name)
    except CannotBeMadeError as error:
        assert name not in DONE
        pytest.skip(str(error))
    model = tmp_path / "model"
    member.save_pretrained(model)
    before = sorted((p.relative_to(model), p.stat().st_size) for p in model.rglob("*"))
    image, onnx_image = tmp_path / "torch.png", tmp_path / "onnx.png"
    size = ["--height", 16, "--width", 16] if "height" in parameters_of(member) else []
    codes = {
        "inspect": run(capsys, "inspect", model),
        "generate": run(capsys, "generate", model, "--prompt", PROMPT, "--out", image, *STEPS, *size),
        "compress": run(
            capsys, "compress", model, "--out", tmp_path / "slim", "--reduce", "2%", "--samples", 2, *STEPS, *size
        ),
        "export": run(capsys, "export", model, "--out", tmp_path / "onnx", *size),
    }
    assert codes["inspect"] == 0 or codes["compress"] != 0
    if name in DONE:
        assert set(codes.values()) == {0}
    assert sorted((p.relative_to(model), p.stat().st_size) for p in model.rglob("*")) == before
    for made in ("compress", "export"):
        assert (tmp_path / {"compress": "slim", "export": "onnx"}[made]).exists() == (codes[made] == 0)
    if codes["compress"] == 0:
        slim = tmp_path / "slim"
        assert run(capsys, "inspect", slim) == 0
        again = run(capsys, "generate", slim, "--prompt", PROMPT, "--out", tmp_path / "s.png", *STEPS, *size)
        assert again == codes["generate"]
    if codes["export"] == 0 and codes["generate"] == 0:
        run(capsys, "generate", tmp_path / "onnx", "--prompt", PROMPT, "--out", onnx_image, *STEPS)
        assert onnx_image.exists() or name not in DONE
        assert not onnx_image.exists() or same_image(image, onnx_image)


@pytest.mark.parametrize("name", pipeline_names())
def test_a_directory_without_its_weights_is_one_line(name, tmp_path, capsys):
    """Every class is seen, of what components it may be: one that is not whole is refused by all."""
    kind = getattr(diffusers, name)
    types = kind._get_signature_types()
    index: dict[str, object] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
    for part in list(inspect.signature(kind.__init__).parameters)[1:]:
        found = [one for one in types.get(part, ()) if inspect.isclass(one) and one.__module__ != "builtins"]
        if found:
            index[part] = [found[0].__module__.split(".")[0], found[0].__name__]
            (tmp_path / "model" / part).mkdir(parents=True)
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert run(capsys, "compress", tmp_path / "model", "--out", tmp_path / "slim", "--reduce", "2%") != 0
    assert not (tmp_path / "slim").exists()

"""Engines of a whole pipeline: which there are, and that their shapes take whatever diffusers asks of them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from exporters.engine.check import choose_profile
from exporters.engine.pipeline import component_shapes, request_pipeline
from exporters.engine.shapes import engine_shapes
from exporters.settings import EngineSettings, ShapeRange
from slimdiff.errors import InputError

pytest.importorskip("onnx", reason="engines are built from ONNX")

RTX = EngineSettings(backend="tensorrt-rtx", targets=["sm89"])
UNET = {"sample": ["batch", 4, "8*height", "8*width"], "timestep": [], "encoder_hidden_states": ["batch", 77, 768]}
TEXT = {"input_ids": ["batch", 77]}
DECODER = {"latent_sample": ["batch", 4, "height", "width"]}
ENCODER = {"sample": ["batch", 3, "8*height", "8*width"]}


def unet(*ranges):
    """A UNet's shapes: for one, fixed; for three, a profile from min over opt to max."""
    if len(ranges) == 1:
        return engine_shapes(UNET, EngineSettings(shapes={"sample": ranges[0]}))
    ends = [dict(zip(("min", "opt", "max"), ranges[i : i + 3], strict=True)) for i in range(0, len(ranges), 3)]
    profiles = [ShapeRange(**{end: {"sample": shape} for end, shape in each.items()}) for each in ends]
    return engine_shapes(UNET, EngineSettings(profiles=profiles))


def batches(found):
    return [tuple(getattr(p, end)["input_ids"][0] for end in ("min", "opt", "max")) for p in found["profiles"]]


def test_a_unet_for_one_sample_leaves_nothing_open():
    assert component_shapes(TEXT, unet("1x4x64x64")) == {"shapes": {"input_ids": (1, 77)}}


@pytest.mark.parametrize(("batch", "ends"), [(2, (1, 1, 2)), (3, (1, 3, 3)), (8, (1, 4, 8))])
def test_others_take_the_images_of_a_call_guided_or_not(batch, ends):
    assert batches(component_shapes(TEXT, unet(f"{batch}x4x64x64"))) == [ends]


def test_sizes_are_the_unets():
    found = unet("2x4x64x48")
    assert component_shapes(DECODER, found)["profiles"][0].opt == {"latent_sample": (1, 4, 64, 48)}
    assert component_shapes(ENCODER, found, scale=8)["profiles"][0].max == {"sample": (2, 3, 512, 384)}
    fixed = {"latent_sample": ["batch", 4, 32, 32]}
    assert component_shapes(fixed, found)["profiles"][0].opt == {"latent_sample": (1, 4, 32, 32)}


def test_there_is_a_profile_for_each_of_the_unets_that_differs():
    found = unet("2x4x64x64", "2x4x64x64", "4x4x64x64", "2x4x96x64", "2x4x96x64", "4x4x96x64")
    assert batches(component_shapes(TEXT, found)) == [(1, 1, 4)]
    sides = [p.max["latent_sample"][2:] for p in component_shapes(DECODER, found)["profiles"]]
    assert sides == [(64, 64), (96, 64)]


def test_what_nothing_fixes_is_named():
    with pytest.raises(InputError, match="input_ids leaves sequence_length open.*slimdiff export"):
        component_shapes({"input_ids": ["batch", "sequence_length"]}, unet("2x4x64x64"))
    with pytest.raises(InputError, match="no input sample"):
        component_shapes(TEXT, {"fixed": {"x": [1, 2]}})


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prompts", [["abc"], ["abc", "cab"]])
def test_diffusers_asks_for_nothing_else(rtx, onnx_folder, pipeline, guidance, prompts):
    """Every call that a real pipeline makes of its parts is taken, when all of it goes through the UNet's one shape."""
    batch = 2 * len(prompts) if guidance > 1 else len(prompts)
    requests = request_pipeline(onnx_folder, RTX.model_copy(update={"batch": batch}), gpu=lambda: None)
    seen = []

    def watch(name, given):
        def hook(_module, args, kwargs):
            seen.append((name, {given: tuple((args[0] if args else kwargs[given]).shape)}))

        return hook

    hooks = [
        pipeline.text_encoder.register_forward_pre_hook(watch("text_encoder", "input_ids"), with_kwargs=True),
        pipeline.vae.decoder.register_forward_pre_hook(watch("vae_decoder", "latent_sample"), with_kwargs=True),
        pipeline.vae.encoder.register_forward_pre_hook(watch("vae_encoder", "sample"), with_kwargs=True),
    ]
    from_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    options = {"num_inference_steps": 2, "guidance_scale": guidance, "output_type": "np"}
    picture, each = torch.zeros(1, 3, 16, 16), [torch.Generator().manual_seed(0) for _ in prompts]
    try:
        pipeline(prompts, **options)
        pipeline("abc", num_images_per_prompt=len(prompts), **options)  # which is encoded once
        from_image(prompts, image=picture, **options)
        from_image(prompts, image=picture.expand(len(prompts), -1, -1, -1), generator=each, **options)
        from_image(prompts, image=picture.expand(len(prompts), -1, -1, -1), **options)
    finally:
        for hook in hooks:
            hook.remove()
    assert {name for name, _ in seen} == {"text_encoder", "vae_decoder", "vae_encoder"}
    assert max(shape[0] for _, shapes in seen for shape in shapes.values()) == len(prompts)
    for name, shapes in seen:
        choose_profile({"parts": requests[name].parts}, shapes)


@pytest.mark.slow
def test_an_sdxl_pipeline_has_five_engines(rtx, onnx_xl_folder):
    requests = request_pipeline(onnx_xl_folder, RTX.model_copy(update={"batch": 2}), gpu=lambda: None)
    assert tuple(requests) == ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
    assert requests["unet"].parts["shapes"]["fixed"]["text_embeds"] == [2, 16]
    for name in tuple(requests)[1:]:
        (profile,) = requests[name].parts["shapes"]["profiles"]
        assert [[ends[end][0] for end in ("min", "opt", "max")] for ends in profile.values()] == [[1, 1, 2]]


def test_each_engine_has_a_key_of_its_own(rtx, onnx_folder, tmp_path):
    folder = shutil.copytree(onnx_folder, tmp_path / "onnx")
    two = RTX.model_copy(update={"batch": 2})
    before = {name: r.key for name, r in request_pipeline(folder, two, gpu=lambda: None).items()}
    assert len(set(before.values())) == len(before) == 4
    data = folder / "vae_decoder" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    after = {name: r.key for name, r in request_pipeline(folder, two, gpu=lambda: None).items()}
    assert {name for name in before if before[name] != after[name]} == {"vae_decoder"}
    four = request_pipeline(folder, RTX.model_copy(update={"batch": 4}), gpu=lambda: None)
    assert not {r.key for r in four.values()} & set(after.values())


def test_what_is_no_pipeline_is_refused(rtx, onnx_folder, tmp_path):
    with pytest.raises(InputError, match="no exported pipeline.*slimdiff export"):
        request_pipeline(onnx_folder / "unet", RTX, gpu=lambda: None)
    folder = shutil.copytree(onnx_folder, tmp_path / "onnx")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(InputError, match="no text_encoder/model.onnx, which its pipeline needs"):
        request_pipeline(folder, RTX.model_copy(update={"batch": 2}), gpu=lambda: None)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    assert "text_encoder" not in request_pipeline(folder, RTX.model_copy(update={"batch": 2}), gpu=lambda: None)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(InputError, match="names no unet"):
        request_pipeline(folder, RTX.model_copy(update={"batch": 2}), gpu=lambda: None)

"""Every weight of every component comes from its files, in their dtype, or the pipeline is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from deploy.artifacts.files import save_pipeline
from slimdiff import InputError
from slimdiff.loading.components import load_component
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.loading.weights import find_weights
from slimdiff.settings import WeightSettings

FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
FILES |= {"safety_checker": "model", "image_encoder": "model"}


@pytest.fixture(scope="session")
def whole(pipeline, tmp_path_factory) -> Path:
    """Stable Diffusion with every component that it may have."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8, projection_dim=16)
    text = CLIPTextConfig(**small, vocab_size=100, projection_dim=16, bos_token_id=0, eos_token_id=1)
    both = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    parts = {
        "safety_checker": StableDiffusionSafetyChecker(both),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "feature_extractor": CLIPImageProcessor(size=16, crop_size=16),
    }
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_pipeline(StableDiffusionPipeline(**{**pipeline.components, **parts}), folder)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def weights(model: Path, name: str, variant: str = "") -> Path:
    return model / name / f"{FILES[name]}{variant}.safetensors"


def rewrite(file: Path, change) -> None:
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, {"format": "pt"})


def refused(model: Path, *parts: str, **how) -> None:
    with pytest.raises(InputError) as error:
        load_pipeline(model, **how)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def held(part: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in part.parameters()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["lack", "also have", "shape"])
def test_weights_that_do_not_fit_are_refused_by_component_and_tensor(model, name, fault):
    file = weights(model, name)
    tensors = load_file(file)
    first = next(key for key in sorted(tensors) if tensors[key].ndim > 1)
    changed = {"lack": {}, "also have": {"an.other": tensors[first].clone()}, "shape": {first: tensors[first][:1]}}[
        fault
    ]
    kept = {key: value for key, value in tensors.items() if fault != "lack" or key != first}
    rewrite(file, lambda _: kept | changed)
    plain = re.sub(r"\b(text_model|vision_model)\.", "", first)
    refused(
        model,
        f"the {name} in",
        "an.other" if fault == "also have" else plain,
        {"shape": "in the files"}.get(fault, fault),
    )


@pytest.mark.parametrize("prefixed", [True, False])
def test_clips_weights_are_found_with_and_without_the_prefix(model, prefixed):
    expected = {name: load_pipeline(model).components[name].state_dict() for name in ("text_encoder", "safety_checker")}
    text = "text_model." if prefixed else ""
    seen = "vision_model.vision_model." if prefixed else "vision_model."
    rewrite(weights(model, "text_encoder"), lambda t: {text + k.removeprefix("text_model."): v for k, v in t.items()})
    rewrite(
        weights(model, "safety_checker"),
        lambda t: {re.sub(r"^(vision_model\.)+", seen, k): v for k, v in t.items()},
    )
    found = load_pipeline(model)
    for name, state in expected.items():
        own = found.components[name].state_dict()
        assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)


def test_buffers_that_older_files_hold_are_no_fault(model):
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(weights(model, "text_encoder"), lambda t: {**t, **ids})
    load_pipeline(model)


def test_a_component_whose_folder_is_not_there(model):
    shutil.rmtree(model / "vae")
    refused(model, "model_index.json names a vae", "there is no such folder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_component_keeps_the_dtype_of_its_files(model, dtype):
    for name in ("unet", "text_encoder", "image_encoder"):
        rewrite(weights(model, name), lambda t: {k: v.to(dtype) for k, v in t.items()})
    found = load_pipeline(model)
    assert held(found.unet) == held(found.text_encoder) == held(found.image_encoder) == {dtype}
    assert held(found.vae) == held(found.safety_checker) == {torch.float32}
    assert held(load_pipeline(model, "fp32").unet) == {torch.float32}
    assert held(load_pipeline(model, torch.bfloat16).vae) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["unet", "text_encoder"])
def test_tensors_of_two_dtypes_in_one_file_keep_theirs(model, name):
    before = load_file(weights(model, name))
    wide = sorted(before)[0]
    rewrite(weights(model, name), lambda t: {k: v if k == wide else v.half() for k, v in t.items()})
    found = load_pipeline(model).components[name].state_dict()
    assert {v.dtype for k, v in found.items() if k.removeprefix("text_model.") != wide.removeprefix("text_model.")} == {
        torch.float16
    }
    kept = next(v for k, v in found.items() if k.removeprefix("text_model.") == wide.removeprefix("text_model."))
    assert torch.equal(kept, before[wide])


def test_dtypes_that_there_are_not_and_weights_too_large_for_fp16(model):
    refused(model, "dtype 'int8': weights are fp32, fp16, bf16", dtype="int8")
    rewrite(weights(model, "vae"), lambda t: {k: v + 1e6 if k == "post_quant_conv.weight" else v for k, v in t.items()})
    refused(model, "the vae's post_quant_conv.weight has values that fp16 does not hold", dtype="fp16")


def test_a_variant_alone_is_taken_and_of_several_the_unnamed_one(model, tmp_path):
    for name in FILES:
        file = weights(model, name)
        save_file({k: v.half() for k, v in load_file(file).items()}, weights(model, name, ".fp16"), {"format": "pt"})
    assert held(load_pipeline(model).unet) == {torch.float32}
    assert held(load_pipeline(model, variant="fp16").unet) == {torch.float16}
    refused(model, "has no variant 'ema': there is fp16", variant="ema")
    weights(model, "safety_checker", ".fp16").unlink()  # a component may have none of the variant
    mixed = load_pipeline(model, variant="fp16")
    assert held(mixed.unet) == {torch.float16} and held(mixed.safety_checker) == {torch.float32}
    for name in ("unet", "vae", "text_encoder"):
        weights(model, name).unlink()
    assert held(load_pipeline(model).unet) == {torch.float16}
    shutil.copy(weights(model, "unet", ".fp16"), weights(model, "unet", ".ema"))
    refused(model, "unet has the variants ema, fp16 and none without a name")
    weights(model, "unet", ".fp16").unlink()
    refused(model, "unet has no weights of the variant 'fp16': there is ema", variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_written_and_read(whole, tmp_path, variant):
    expected = load_pipeline(whole)
    save_pipeline(expected, tmp_path / "model", WeightSettings(variant=variant, max_shard_size="30KB"))
    indices = list((tmp_path / "model").glob("*/*.index*.json"))
    assert {"unet", "text_encoder"} <= {file.parent.name for file in indices}
    found = load_pipeline(tmp_path / "model")
    for name in FILES:
        own, state = found.components[name].state_dict(), expected.components[name].state_dict()
        assert all(torch.equal(own[key], state[key]) for key in state)
    for file in indices:
        file.unlink()
    refused(tmp_path / "model", "is a shard, and its index is not beside it")


@pytest.mark.parametrize("value", ["5", "5 XB", "-5GB", "0GB", "GB", ""])
def test_sizes_of_shards_are_checked(value):
    with pytest.raises(ValueError, match="max_shard_size"):
        WeightSettings(max_shard_size=value)


def test_a_component_that_the_index_says_is_none(pipeline, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPTextConfig(**small, vocab_size=len(pipeline.tokenizer), projection_dim=8, bos_token_id=0, eos_token_id=1)
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(clip) for n in ("", "_2")}
    StableDiffusion3Pipeline(
        transformer=FAMILIES["sd3"].make(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        tokenizer_2=pipeline.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        **encoders,
    ).save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    found = load_pipeline(tmp_path / "model")
    assert found.text_encoder_3 is None and found.tokenizer_3 is None and held(found.text_encoder) == {torch.float32}
    save_pipeline(found, tmp_path / "again")
    assert load_pipeline(tmp_path / "again").text_encoder_3 is None


def held_t5(folder, dtype) -> tuple[T5EncoderModel, dict[str, torch.Tensor]]:
    """A T5 encoder loaded from files of a dtype, and what the files hold."""
    T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).to(
        dtype
    ).save_pretrained(folder)
    encoder = load_component(folder, T5EncoderModel, find_weights(folder, T5EncoderModel))
    return encoder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copied", [False, True])
def test_what_a_class_keeps_in_float32_is_computed_so_and_saved_as_its_file_has_it(tmp_path, dtype, copied):
    encoder, files = held_t5(tmp_path / "in", dtype)
    wide = {t.dtype for n, t in encoder.named_parameters() if ".wo." in n}
    assert wide == ({torch.float32} if dtype == torch.float16 else {dtype})
    assert {t.dtype for n, t in encoder.named_parameters() if ".wo." not in n} == {dtype}
    (copy.deepcopy(encoder) if copied else encoder).save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == files.keys()
    assert all(saved[name].dtype == dtype and torch.equal(saved[name], tensor) for name, tensor in files.items())


def test_what_diffusers_keeps_in_float32_is_saved_as_its_file_has_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoencoderKL, "_keep_in_fp32_modules", ["conv_in"])
    rewrite(weights(model, "vae"), lambda t: {k: v.half() for k, v in t.items()})
    vae = load_pipeline(model).vae
    assert {t.dtype for n, t in vae.named_parameters() if "conv_in" in n} == {torch.float32}
    vae.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float16}


def test_a_model_that_was_cast_after_loading_is_saved_as_it_was_cast(tmp_path):
    encoder, _ = held_t5(tmp_path / "in", torch.float16)
    encoder.float().save_pretrained(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}

"""Models in one safetensors file of the original layout: opened as they are, or refused by what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families.original_layout import make_pipeline, original_tensors
from loras import peft_layout
from safetensors.torch import load_file, save_file

from deploy.artifacts.hashes import model_hash
from deploy.artifacts.kinds import kind_of
from slimdiff import InputError
from slimdiff.loading.naming import find_model
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.loading.single_file import Header, layout_table, text_config
from slimdiff.storage import manifest
from tests.command_line import call

EXTRAS = {
    "betas": torch.zeros(1000),
    "alphas_cumprod": torch.zeros(1000),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
    "model_ema.decay": torch.zeros(()),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "denoiser.sigmas": torch.zeros(1000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}
"""What files of the original layout have besides, and nobody reads."""


@pytest.fixture(scope="module")
def sd1() -> Any:
    return make_pipeline("sd1")


@pytest.fixture(scope="module")
def sd1_file(sd1, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sd1") / "sd1.safetensors"
    save_file(original_tensors(sd1) | EXTRAS, file)
    return file


@pytest.mark.parametrize("kind", ["sd1", "inpaint", "pix2pix", "sd2", "sd2-v", "sdxl", "refiner"])
def test_a_file_is_the_pipeline_that_it_was_made_from(kind, tmp_path):
    dense, file = make_pipeline(kind), tmp_path / "model.safetensors"
    if kind == "sd2-v":
        dense.unet.up_blocks[1].attentions[1].transformer_blocks[0].norm1.bias.data = torch.linspace(-1, 1, 64)
    save_file(original_tensors(dense), file)
    loaded = load_pipeline(file)
    assert type(loaded) is type(dense)
    assert {k: type(v) for k, v in loaded.components.items()} == {k: type(v) for k, v in dense.components.items()}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (part := getattr(dense, name, None)) is not None:
            state, other = part.state_dict(), getattr(loaded, name).state_dict()
            assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    _same_settings(dense, loaded)
    assert {k: v for k, v in loaded.config.items() if k != "_name_or_path"} == dict(dense.config)
    _same_outputs(dense, loaded)


def _same_settings(dense: Any, loaded: Any) -> None:
    for name in ("unet", "vae", "scheduler"):
        ours, theirs = dict(getattr(loaded, name).config), dict(getattr(dense, name).config)
        ours.pop("_use_default_values"), theirs.pop("_use_default_values")
        per = theirs.get("transformer_layers_per_block")
        theirs |= {"transformer_layers_per_block": [per] * 2} if isinstance(per, int) else {}
        heads = theirs.get("attention_head_dim")
        theirs |= {"attention_head_dim": [heads] * 2} if isinstance(heads, int) else {}
        assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))


@torch.no_grad()
def _same_outputs(dense: Any, loaded: Any) -> None:
    # Weights of a mapped file lie at any address, and some processors' sums have other last bits by that.
    for module in (part for pipeline in (dense, loaded) for part in pipeline.components.values()):
        for weight in module.parameters() if isinstance(module, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    torch.manual_seed(3)
    config = dense.unet.config
    call = {
        "sample": torch.randn(1, config.in_channels, 16, 16),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type:
        ids = (config.projection_class_embeddings_input_dim - 64) // config.addition_time_embed_dim
        call["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, ids)}
    assert torch.equal(dense.unet(**call).sample, loaded.unet(**call).sample)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(dense.vae.decode(latents).sample, loaded.vae.decode(latents).sample)
    encoded = [_encode(pipeline) for pipeline in (dense, loaded)]
    for one, other in zip(*encoded, strict=True):
        assert torch.equal(one, other)


def _encode(pipeline: Any) -> tuple[torch.Tensor, ...]:
    """What its text encoders say of a prompt and of no prompt."""
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if not hasattr(pipeline, "encode_prompt"):  # InstructPix2Pix
        return (pipeline._encode_prompt("a red circle", **how),)
    return tuple(pipeline.encode_prompt("a red circle", **how))


def test_a_file_is_slimmed_from_the_command_line_and_its_slim_model_opens(sd1_file, tmp_path, capsys):
    (sd1_file.parent / "LICENSE.md").write_text("mine")
    out = tmp_path / "slim"
    small = ("--samples", "2", "--steps", "2", "--height", "16", "--width", "16", "--align", "8")
    call(["compress", sd1_file, "--out", out, "--reduce", "10%", *small], capsys)
    slim, dense = load_pipeline(out), load_pipeline(sd1_file)
    assert slim.unet.num_parameters() < 0.91 * dense.unet.num_parameters()
    assert (out / "LICENSE.md").read_text() == "mine"
    assert slim.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_a_file_is_told_from_statistics_and_hashed_by_its_bytes(sd1_file, compression, tmp_path):
    assert kind_of(str(sd1_file)) == "model"
    assert model_hash(str(sd1_file)) == manifest.sha256_of(sd1_file)
    compression.statistics.save(tmp_path / "sums.safetensors")
    assert kind_of(str(tmp_path / "sums.safetensors")) == "statistics"
    with pytest.raises(InputError, match="is statistics of slimdiff, and no model"):
        find_model(tmp_path / "sums.safetensors")


def test_each_weight_keeps_the_dtype_of_the_file_unless_one_is_asked_for(sd1, tmp_path):
    file = tmp_path / "half.safetensors"
    tensors = original_tensors(sd1)
    save_file({k: v if k.startswith("first_stage") else v.half() for k, v in tensors.items()}, file)
    loaded = load_pipeline(file)
    assert (loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder.dtype) == (torch.half, torch.float, torch.half)
    assert load_pipeline(file, "fp32").unet.dtype == torch.float
    assert load_pipeline(file, "fp16", without=("unet", "transformer")).unet is None


def test_a_lora_is_fused_into_a_file_as_into_a_directory(sd1, sd1_file, tmp_path):
    pytest.importorskip("peft", reason="LoRA layers are fused by the extra lora")
    sd1.save_pretrained(tmp_path / "model")
    peft_layout(sd1, tmp_path / "style.safetensors", lambda path: path.endswith(("to_q", "ff.net.2")))
    one, other, plain = (
        load_pipeline(model, lora=lora).unet.state_dict()
        for model, lora in (
            (sd1_file, [f"{tmp_path / 'style.safetensors'}:0.5"]),
            (tmp_path / "model", [f"{tmp_path / 'style.safetensors'}:0.5"]),
            (sd1_file, []),
        )
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], plain[name]) for name in one)


def test_a_file_has_no_variants(sd1_file):
    with pytest.raises(InputError, match="is one file, without variants"):
        load_pipeline(sd1_file, variant="fp16")


@pytest.mark.parametrize("said", ["metadata", "yaml", "tensor"])
def test_what_a_model_predicts_is_taken_from_the_file_or_from_beside_it(said, sd1, tmp_path):
    file = tmp_path / "v.safetensors"
    metadata = {"modelspec.prediction_type": "v"} if said == "metadata" else None
    more = {"v_pred": torch.zeros(())} if said == "tensor" else {}
    save_file(original_tensors(sd1) | more, file, metadata)
    if said == "yaml":
        file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert load_pipeline(file).scheduler.config.prediction_type == "v_prediction"


def _changed(change: Any) -> Any:
    def write(tensors: dict[str, torch.Tensor], file: Path) -> None:
        change(tensors)
        save_file(tensors, file)

    return write


def _only(*starts: str, named: str = "") -> Any:
    def write(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save_file({named + k.removeprefix(s): v for s in starts for k, v in tensors.items() if k.startswith(s)}, file)

    return write


def _names(*names: str) -> Any:
    return lambda tensors, file: save_file({name: torch.zeros(4, 4) for name in names}, file)


UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
REFUSED = {
    "a LoRA": (
        _names("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight"),
        "is a LoRA, .* give this with --lora",
    ),
    "PEFT's LoRA": (_names("unet.down_blocks.0.to_q.lora_A.weight"), "is a LoRA"),
    "a ControlNet": (_names("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "an embedding": (_names("emb_params"), "is a textual inversion"),
    "Flux": (_names("double_blocks.0.img_attn.norm.key_norm.scale"), "is Flux's transformer: name a safetensors file"),
    "SD3": (
        _names("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"),
        "is Stable Diffusion 3's transformer",
    ),
    "diffusers' UNet": (_names("down_blocks.0.resnets.0.conv1.weight"), "is a denoiser alone, of diffusers"),
    "diffusers' VAE": (_names("encoder.down_blocks.0.resnets.0.conv1.weight"), "is a VAE alone, of diffusers"),
    "a VAE": (_only(VAE), "is a VAE alone"),
    "a VAE with its prefix": (_only(VAE, named=VAE), "it has a VAE, and no UNet and no text encoder"),
    "a UNet": (_only(UNET), "is a UNet alone"),
    "no text encoder": (
        _changed(lambda t: [t.pop(k) for k in [*t] if k.startswith(TEXT)]),
        "and no text encoder; name",
    ),
    "random tensors": (_names("weight", "bias"), "is no model of a known layout"),
    "no tensor": (lambda tensors, file: save_file({}, file), "is no model of a known layout"),
    "an empty file": (lambda tensors, file: file.write_bytes(b""), "is not a whole safetensors file"),
    "an absent weight": (_changed(lambda t: t.pop(UNET + "out.2.bias")), r"no whole unet: it lacks conv_out\.bias"),
    "an unknown weight": (
        _changed(lambda t: t.update({UNET + "extra.weight": torch.zeros(1)})),
        r"no whole unet: it also has model\.diffusion_model\.extra\.weight",
    ),
    "an unknown part": (
        _changed(lambda t: t.update(other=torch.zeros(1))),
        "holds other, of no part of Stable Diffusion 1",
    ),
    "another shape": (
        _changed(lambda t: t.update({VAE + "encoder.conv_in.bias": torch.zeros(3)})),
        r"no whole vae: it has another shape of encoder\.conv_in\.bias \(\[3\], not \[32\]\)",
    ),
    "an absent block": (_changed(lambda t: [t.pop(k) for k in [*t] if ".input_blocks.2." in k]), r"input_blocks\.\*"),
    "few words": (
        _changed(lambda t: [t.update({k: v[:100].clone()}) for k, v in t.items() if "token_embedding" in k]),
        "has a text encoder of 100 words",
    ),
    "depth to image": (
        _changed(lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.zeros(64, 5, 3, 3)})),
        "has a UNet for depth to image, of 5 input channels",
    ),
    "fp8": (
        _changed(lambda t: t.update({UNET + "out.2.bias": torch.zeros(4).to(torch.float8_e4m3fn)})),
        "with --dtype",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_whole_model_is_refused_by_what_it_is(what, sd1_file, tmp_path):
    write, message = REFUSED[what]
    file = tmp_path / "model.safetensors"
    write(load_file(sd1_file), file)
    with pytest.raises(InputError, match=message) as error:
        load_pipeline(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".gguf"])
def test_a_file_that_is_not_safetensors_is_refused(suffix, tmp_path):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="is a file, and no" if suffix == ".gguf" else "is a pickle .* refused"):
        find_model(file)


def test_a_truncated_file_is_refused(sd1_file, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(sd1_file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        find_model(file)


def test_a_file_is_refused_before_torch_is_loaded(sd1_file):
    code = "import sys, slimdiff.loading.naming as n; n.find_model(sys.argv[1]); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code, str(sd1_file)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize("there", [23, 24])
def test_stable_diffusion_2_reads_23_layers_of_its_text_encoder_whether_the_24th_is_there_or_not(there):
    text = layout_table("layouts.json")["sd2"]["text_encoders"][0]
    shapes = {f"transformer.resblocks.{n}.mlp.c_fc.weight": (4096, 1024) for n in range(there)}
    shapes |= {"token_embedding.weight": (49408, 1024), "positional_embedding": (77, 1024)}
    header = Header(Path("sd2.safetensors"), {text["prefix"] + k: v for k, v in shapes.items()}, {}, {})
    config = text_config(header, text)
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (23, 16)

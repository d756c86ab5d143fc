"""The parts of a small Flux of the things world: stock classes; the text encoder CLIP and the VAE are `model`'s."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from benchmarks.things import models, world

BASE = Path(__file__).with_name("model")  # whose autoencoder, CLIP and tokenizer the pipeline shares
SIDE = world.IMAGE_SIZE // 4  # of the latents
TRANSFORMER = {
    "in_channels": 16,  # the autoencoder's 4, packed two by two
    "num_layers": 2,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": models.TEXT_WIDTH,
    "pooled_projection_dim": models.TEXT_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 14, 14),
}
_SPECIAL = ("<pad>", "</s>", "<unk>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789DABCEFGHIJKLMNOPQRSTUVWXYZ,.-'!?"


def build_tokenizer(folder: Path) -> T5TokenizerFast:
    """T5's tokenizer with every word of the captions as one piece; other words are spelled."""
    words = sorted({word for phrase in models.phrases() for word in phrase.split() if word != ","})
    pieces = [*((s, 0.0) for s in _SPECIAL), ("▁", -8.0), *((letter, -8.0) for letter in _LETTERS)]
    pieces += [("▁" + word, -4.0) for word in words if len(word) > 1 or word == "a"]
    inner = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=2, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    inner.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    inner.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    inner.add_special_tokens(list(_SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": models.MAX_TOKENS,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer: T5TokenizerFast = T5TokenizerFast.from_pretrained(folder)
    return tokenizer


def build_text_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=models.TEXT_WIDTH,
        d_kv=40,
        d_ff=448,
        num_layers=4,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_max_distance=models.MAX_TOKENS,
    )
    return T5EncoderModel(config)


def build_transformer() -> FluxTransformer2DModel:
    """Blocks begin as the identity, with their gates at zero (adaLN-Zero, Peebles and Xie 2023)."""
    transformer = FluxTransformer2DModel(**TRANSFORMER)
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    modulations = [m.linear for b in blocks for m in b.children() if type(m).__name__.startswith("AdaLayerNorm")]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
    return transformer


def load_base() -> tuple[AutoencoderKL, CLIPTextModel]:
    """The committed autoencoder and CLIP text encoder, in float32 and frozen."""
    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # Flux's pipeline adds it
    clip = CLIPTextModel.from_pretrained(BASE / "text_encoder", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False), clip.eval().requires_grad_(False)


def pack(latents: Tensor) -> Tensor:
    """`[B, 4, 16, 16]` as tokens `[B, 64, 16]`."""
    packed: Tensor = FluxPipeline._pack_latents(latents.contiguous(), *latents.shape)
    return packed


def positions(device: torch.device | str) -> dict[str, Tensor]:
    """The transformer's arguments of where tokens are."""
    image = FluxPipeline._prepare_latent_image_ids(1, SIDE // 2, SIDE // 2, device, torch.float32)
    return {"img_ids": image, "txt_ids": torch.zeros(models.MAX_TOKENS, 3, device=device)}


@torch.no_grad()
def sample(
    transformer: Any, vae: Any, text: tuple[Tensor, Tensor], noise: Tensor, *, steps: int, guidance: float
) -> Tensor:
    """Pictures as FluxPipeline makes them with a negative prompt.

    Args:
        text: T5's hidden states `[B + 1, 40, 160]` and CLIP's pooled ones `[B + 1, 160]`; the last row of both is of
            the empty caption.
        noise: `[B, 4, 16, 16]`.

    Returns:
        float32 `[B, 3, 64, 64]` in [-1, 1].
    """
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=noise.device)
    count, where = len(noise), positions(noise.device)
    states, pooled = (torch.cat([t[-1:].expand(count, *t.shape[1:]), t[:-1]]) for t in text)
    latents = pack(noise)
    for t in scheduler.timesteps:
        out = transformer(
            hidden_states=torch.cat([latents, latents]),
            timestep=(t / 1000).expand(2 * count),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
            **where,
        )[0].float()
        without, with_text = out.chunk(2)
        latents = scheduler.step(without + guidance * (with_text - without), t, latents, return_dict=False)[0]
    unpacked = FluxPipeline._unpack_latents(latents, world.IMAGE_SIZE, world.IMAGE_SIZE, 4)
    return vae.decode(unpacked, return_dict=False)[0].float().clamp(-1, 1)


@torch.no_grad()
def skipped_blocks(transformer: Any, clean: Tensor, text: tuple[Tensor, Tensor], noise: Tensor) -> dict[str, float]:
    """Relative mean squared change of the velocity when one block alone is passed by, at eight times.

    A dead block changes nothing.
    """
    sigma = (torch.arange(len(clean), device=clean.device) % 8 + 0.5) / 8
    s = sigma[:, None, None, None]
    noisy = pack((1 - s) * clean + s * noise)
    states, pooled = text
    where = positions(clean.device)

    def predict() -> Tensor:
        inputs = {"encoder_hidden_states": states, "pooled_projections": pooled, **where}
        out: Tensor = transformer(hidden_states=noisy, timestep=sigma, return_dict=False, **inputs)[0]
        return out.float()

    def pass_by(_module: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any) -> tuple[Tensor, Tensor]:
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    usual, changes = predict(), {}
    for name, module in transformer.named_modules():
        if type(module).__name__ in ("FluxTransformerBlock", "FluxSingleTransformerBlock"):
            handle = module.register_forward_hook(pass_by, with_kwargs=True)
            changes[name] = ((predict() - usual).square().mean() / usual.square().mean()).item()
            handle.remove()
    return {name: float(f"{change:.3g}") for name, change in changes.items()}


def save_pipeline(folder: Path, transformer: nn.Module, encoder: nn.Module, tokenizer_files: Path) -> None:
    """Write a FluxPipeline of fp16 weights; the folder changes in one step.

    What it shares with the first things model is copied from there, byte for byte.
    """

    def half(module: Any) -> Any:
        return copy.deepcopy(module).to("cpu", torch.float16).eval()

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(BASE / name, partial / name)
    config = json.loads((partial / "vae" / "config.json").read_text())
    (partial / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.0}, indent=2) + "\n")
    half(transformer).save_pretrained(partial / "transformer", max_shard_size=models.SHARD)
    half(encoder).save_pretrained(partial / "text_encoder_2", max_shard_size=models.SHARD)
    shutil.copytree(tokenizer_files, partial / "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": scheduler.config["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

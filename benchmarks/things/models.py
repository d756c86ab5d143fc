"""The model's parts: stock diffusers and transformers classes in Stable Diffusion 1.5's shape, made small."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.things import backgrounds, world
from benchmarks.vocabulary import write_vocabulary

TEXT_WIDTH = 160
MAX_TOKENS = 40
SHARD = "14MB"  # a file of weights at most

SCHEDULER = {
    "num_train_timesteps": 1000,
    # Stable Diffusion's schedule with a longer tail: at the last step a 16x16 latent must hold no trace of its
    # background, or sampling from pure noise would pull every background to the mean.
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
UNET = {
    "sample_size": world.IMAGE_SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (80, 120, 120),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (2, 3, 3),  # the number of heads, by diffusers' old misnomer: every head has 40 dimensions
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": world.IMAGE_SIZE,
}


def phrases() -> list[str]:
    """Every part a caption is made of."""
    parts = ["a", ",", "on a", "background", *world.STYLES, *filter(None, world.SIZES)]
    return [*parts, *world.NAMES, *world.PLACES, *backgrounds.NAMES]


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's format in which every word of the captions is one token ("3D" is two)."""
    words = sorted({word for phrase in phrases() for word in phrase.lower().split() if word.isalpha()})
    write_vocabulary(words, folder, 20_000, pre_tokenizers.WhitespaceSplit())
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return ids.input_ids


class CaptionTable:
    """Token ids of scenes' captions by look-up, on any device; checked against the tokenizer when made."""

    def __init__(self, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        """`tokenizer` is CLIP's or T5's."""

        def table(parts: list[str] | tuple[str, ...]) -> Tensor:
            rows = [tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in parts]
            width = max(map(len, rows))
            return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)

        self.begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.end, self.padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.names, self.styles, self.sizes = table(world.NAMES), table(world.STYLES), table(world.SIZES)
        self.places, self.backgrounds = table(world.PLACES), table(backgrounds.NAMES)
        self.article, self.on, self.tail = (table([p]) for p in ("a", "on a", "background"))
        self.comma = table(["a,"])[:, -1:]  # as it is after a word
        sample = world.sample_scenes(256, 0, held=False)
        if not torch.equal(self(sample.to(device)).cpu(), tokenize(tokenizer, world.captions(sample))):
            raise RuntimeError("the table of captions and the tokenizer disagree")
        self.empty = tokenize(tokenizer, [""]).to(device)

    def __call__(self, scenes: Tensor) -> Tensor:
        """Padded ids, int64 `[B, 40]`."""
        count = len(scenes)
        pieces = [scenes.new_full((count, 1), begin) for begin in self.begin]
        for thing in world.things(scenes).unbind(1):
            concept, style, size, place = thing.clamp(min=0).unbind(1)
            parts = [self.article.expand(count, -1), self.sizes[size], self.styles[style], self.names[concept]]
            parts += [self.places[place], self.comma.expand(count, -1)]
            pieces.append(torch.where(thing[:, :1] >= 0, torch.cat(parts, 1), -1))
        pieces += [self.on.expand(count, -1), self.backgrounds[scenes[:, 0]], self.tail.expand(count, -1)]
        pieces += [scenes.new_full((count, 1), self.end), scenes.new_full((count, MAX_TOKENS), -1)]
        ids = torch.cat(pieces, 1)
        order = (ids < 0).int().argsort(dim=1, stable=True)  # words to the left, gaps to the right
        ids = ids.gather(1, order)[:, :MAX_TOKENS]
        return torch.where(ids < 0, self.padding, ids)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config)


class SceneReader(nn.Module):
    """Asks a caption's hidden states, by cross-attention as the UNet will, what is where and how it looks.

    Used only in training, to give the text encoder a start.
    """

    LOOK = 6 * 6 * 4

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(world.PLACES) + 1, TEXT_WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 4, batch_first=True)
        self.concept = nn.Linear(TEXT_WIDTH, 1 + len(world.NAMES))
        self.style = nn.Linear(TEXT_WIDTH, len(world.STYLES))
        self.size = nn.Linear(TEXT_WIDTH, len(world.SIZES))
        self.background = nn.Linear(TEXT_WIDTH, len(backgrounds.NAMES))
        self.look = nn.Linear(TEXT_WIDTH, self.LOOK)

    def forward(self, states: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits by attribute as `world.labels` names them, and thumbnails `[B, 9, 144]`."""
        read, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states)
        things = read[:, :-1]
        logits = {name: getattr(self, name)(things) for name in ("concept", "style", "size")}
        return {**logits, "background": self.background(read[:, -1])}, self.look(things)


def standardise_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latents.

    Afterwards the latents have mean 0 and deviation 1, so the scaling factor is 1, and pictures stay as they were.
    """
    mean, deviation = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    with torch.no_grad():
        into, out = vae.quant_conv, vae.post_quant_conv
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight *= deviation[None, :, None, None]
        channels = len(mean)
        into.weight[:channels] /= deviation[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) / deviation
        into.bias[channels:] -= 2 * deviation.log()  # the logarithm of the variance
    vae.register_to_config(scaling_factor=1.0)


def save_pipeline(folder: Path, unet: nn.Module, vae: nn.Module, encoder: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """Write a StableDiffusionPipeline of fp16 weights; the folder changes in one step."""

    def half(module: Any) -> Any:
        return copy.deepcopy(module).to("cpu", torch.float16, memory_format=torch.contiguous_format).eval()

    pipeline = StableDiffusionPipeline(
        vae=half(vae),
        text_encoder=half(encoder),
        tokenizer=tokenizer,
        unet=half(unet),
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, max_shard_size=SHARD)
    for name in ("vocab.json", "merges.txt"):  # newer tokenizers write one file of their own instead
        shutil.copy(tokenizer_folder(folder) / name, partial / "tokenizer" / name)
    # transformers 5 leaves the prefix out, and 4 then takes random weights in their place; both read the names with it.
    file = partial / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def tokenizer_folder(folder: Path) -> Path:
    """Where the training keeps the tokenizer's two files, beside the pipeline's folder."""
    return folder.parent / "tokenizer"


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE)

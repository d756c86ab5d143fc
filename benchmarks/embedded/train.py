"""Train the embedded model from nothing: `python -m benchmarks.embedded.train --work runs/embedded`.

Stages, each saved when done and resumed when interrupted: tokenizer, text encoder, autoencoder, latents, UNet,
evaluator.
The seed fixes data and initialisation; figures still vary a little with the machine's arithmetic.
Everything is drawn by `slimdiff.embedded.scenes`; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.vocabulary import write_vocabulary
from slimdiff.embedded import scenes as world
from slimdiff.embedded.evaluator import Evaluator

SEED = 20261121
TEXT_WIDTH = 96
MAX_TOKENS = 40
TRAINING_SCENES = 32_000
BATCH = 32

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
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 64, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    # Attention only where it works. Measured on earlier shapes, as the change of the noise prediction at half rank: a
    # middle block at 4x4 1e-9, blocks of the encoder at 8x8 3e-6 to 5e-6; the decoder's at 8x8 over 1e-5.
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "transformer_layers_per_block": (2, 1, 1),
    "attention_head_dim": (2, 2, 2),  # the number of heads, by diffusers' old misnomer: every head has 32 dimensions
    "cross_attention_dim": TEXT_WIDTH,
    "norm_num_groups": 8,
}


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's format in which every word of the captions is one token."""
    captions = [s.caption() for s in world.sample_scenes(4000, SEED, held_out=False)]
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    write_vocabulary(captions, folder, 400, splitter)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return ids.input_ids


class SceneReader(nn.Module):
    """Asks a caption's hidden states, by cross-attention as the UNet will, what is where. Used only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(5, TEXT_WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, 3, batch_first=True)
        self.shape = nn.Linear(TEXT_WIDTH, 1 + len(world.SHAPES))
        self.colour = nn.Linear(TEXT_WIDTH, len(world.COLOURS))
        self.size = nn.Linear(TEXT_WIDTH, len(world.SIZES))
        self.background = nn.Linear(TEXT_WIDTH, len(world.BACKGROUNDS))

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        f, _ = self.attention(self.queries.expand(len(states), -1, -1), states, states)
        return {
            "shape": self.shape(f[:, :4]),
            "colour": self.colour(f[:, :4]),
            "size": self.size(f[:, :4]),
            "background": self.background(f[:, 4]),
        }


def labels_of(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """Scenes as class indices, int64.

    Returns:
        `shape`, `colour`, `size` of shape `[N, 4]` by place, with `shape` 0 for an empty place and 1 + index otherwise
        (`colour` and `size` are -100, torch's ignored class, at empty places), and `background` of shape `[N]`.
    """
    shape = torch.zeros(len(scenes), len(world.PLACES), dtype=torch.long)
    colour, size = torch.full_like(shape, -100), torch.full_like(shape, -100)
    for i, scene in enumerate(scenes):
        for o in scene.objects:
            shape[i, o.place], colour[i, o.place], size[i, o.place] = o.shape + 1, o.colour, o.size
    background = torch.tensor([s.background for s in scenes])
    return {"shape": shape, "colour": colour, "size": size, "background": background}


def label_loss(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    losses = [F.cross_entropy(logits[k].flatten(0, -2), labels[k].flatten()) for k in logits]
    return torch.stack(losses).sum()


def steps(name: str, start: int, stop: int) -> Iterator[int]:
    yield from tqdm(range(start, stop), initial=start, total=stop, desc=name, mininterval=2)


def train_text_encoder(tokenizer: CLIPTokenizer, count: int = 1500) -> CLIPTextModel:
    torch.manual_seed(SEED)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder, reader = CLIPTextModel(config), SceneReader()
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=count, pct_start=0.1)
    scenes = world.sample_scenes(32_000, SEED + 1, held_out=False)
    ids, labels = tokenize(tokenizer, [s.caption() for s in scenes]), labels_of(scenes)
    generator = torch.Generator().manual_seed(SEED)
    for _ in steps("text encoder", 0, count):
        pick = torch.randint(len(scenes), (128,), generator=generator)
        loss = label_loss(reader(encoder(ids[pick])[0]), {k: v[pick] for k, v in labels.items()})
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    print(f"text encoder: loss {loss.item():.4f}")
    return encoder.eval()


def train_autoencoder(count: int = 2000) -> AutoencoderKL:
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.IMAGE_SIZE,
    )
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=count, pct_start=0.1)
    for step in steps("autoencoder", 0, count):
        images = world.render(world.sample_scenes(16, SEED + 10_000 + step, held_out=False), step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample()
            # The denoiser will not hit the latents exactly: let the decoder learn to forgive.
            latents = latents + 0.05 * latents.detach().std() * torch.randn_like(latents)
            output = vae.decode(latents).sample
        error = output.float() - images
        loss = error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / 256
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f" autoencoder {step}: mse {error.square().mean().item():.5f}", flush=True)
    vae.eval()
    with torch.no_grad():
        images = world.render(world.sample_scenes(256, SEED + 2, held_out=False), 2)
        latents = vae.encode(images).latent_dist.mode()
        error = (vae.decode(latents).sample - images).square().mean()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    print(f"autoencoder: PSNR {10 * torch.log10(4 / error).item():.1f} dB, scaling {vae.config.scaling_factor}")
    return vae


def train_evaluator(vae: AutoencoderKL, count: int = 800) -> Evaluator:
    """A third of its pictures went through the autoencoder, with perturbed latents: it must read those as well."""
    torch.manual_seed(SEED)
    evaluator = Evaluator()
    optimiser = torch.optim.AdamW(evaluator.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=count, pct_start=0.1)
    for step in steps("evaluator", 0, count):
        scenes = world.sample_scenes(48, SEED + 500_000 + step, held_out=False)
        images = world.render(scenes, step)
        with torch.no_grad():
            latents = vae.encode(images[:16]).latent_dist.mode()
            noise = torch.rand(16, 1, 1, 1) * 0.3 * latents.std() * torch.randn_like(latents)
            images[:16] = vae.decode(latents + noise).sample.clamp(-1, 1)
        images = images + 0.05 * torch.randn_like(images)
        loss = label_loss(evaluator(images), labels_of(scenes))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    print(f"evaluator: loss {loss.item():.4f}")
    return evaluator.eval()


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: list[world.Scene]) -> Tensor:
    """Scaled latents, fp16 `[N, 4, 16, 16]`."""
    batches = []
    for i in tqdm(range(0, len(scenes), 256), desc="latents"):
        images = world.render(scenes[i : i + 256], SEED + i)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        batches.append(latents.half())
    return torch.cat(batches).contiguous()


def train_unet(
    work: Path, latents: Tensor, ids: Tensor, encoder: CLIPTextModel, empty: Tensor, count: int
) -> nn.Module:
    """Noise prediction with 10 % dropped captions and min-SNR-5 weights (Hang et al. 2023).

    The learning rate falls to nothing, so no average of the weights is kept: measured on a run of this length, an
    exponential average (0.999) lagged behind, and its blocks did a fifth of what the last weights' blocks do.
    """
    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DConditionModel(**UNET).to(device)
    optimiser = torch.optim.AdamW(unet.parameters(), 1.0, betas=(0.9, 0.99), weight_decay=0.01)
    alphas = DDIMScheduler(**SCHEDULER).alphas_cumprod
    weights = ((alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))).to(device)
    alphas, encoder, empty = alphas.to(device), encoder.to(device), empty.to(device)
    checkpoint, start, losses = work / "unet.checkpoint", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, thing in (("unet", unet), ("optimiser", optimiser)):
            thing.load_state_dict(state[name])
        start = state["step"]
    for step in steps("unet", start, count):
        for group in optimiser.param_groups:  # a function of the step alone, so that a resumed run may be made longer
            group["lr"] = 1.3e-3 * min(1, (step + 1) / 300, (count - step) / (0.4 * count))
        generator = torch.Generator().manual_seed(SEED + step)
        pick = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = latents[pick].float()
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < 0.1
        clean, noise, t, dropped = clean.to(device), noise.to(device), t.to(device), dropped.to(device)
        a = alphas[t][:, None, None, None]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        tokens = torch.where(dropped[:, None], empty, ids[pick].to(device))
        with torch.autocast(device, dtype=torch.bfloat16):
            with torch.no_grad():
                text = encoder(tokens)[0]
            prediction = unet(noisy, t, text).sample
        loss = (weights[t] * (prediction.float() - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == count:
            print(f" unet {step + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
            state = {
                "unet": unet.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").rename(checkpoint)
    return unet.to("cpu").eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"), help="where finished stages are kept")
    parser.add_argument("--unet-steps", type=int, default=3000)
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    began = time.time()

    tokenizer = build_tokenizer(work / "tokenizer")
    if not (work / "text_encoder").exists():
        train_text_encoder(tokenizer).save_pretrained(work / "text_encoder")
    encoder = CLIPTextModel.from_pretrained(work / "text_encoder").requires_grad_(False).eval()
    if not (work / "vae").exists():
        train_autoencoder().save_pretrained(work / "vae")
    vae = AutoencoderKL.from_pretrained(work / "vae").requires_grad_(False).eval()
    scenes = world.sample_scenes(TRAINING_SCENES, SEED, held_out=False)
    if not (work / "latents.safetensors").exists():
        save_file({"latents": encode_scenes(vae, scenes)}, work / "latents.safetensors")
    latents = load_file(work / "latents.safetensors")["latents"]
    ids, empty = tokenize(tokenizer, [s.caption() for s in scenes]), tokenize(tokenizer, [""])
    print(f"stages before the UNet: {time.time() - began:.0f} s", flush=True)

    unet = train_unet(work, latents, ids, encoder, empty, arguments.unet_steps)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.to("cpu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(work / "model")
    if not (work / "evaluator.safetensors").exists():
        save_file(train_evaluator(vae).state_dict(), work / "evaluator.safetensors")
    print(f"trained in {(time.time() - began) / 60:.0f} minutes -> {work / 'model'}")


if __name__ == "__main__":
    main()

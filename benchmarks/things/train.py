"""Train the things model: `python -m benchmarks.things.train --sprites FILE --work DIR --minutes M`.

The budget is time (or, with --samples, the UNet's samples), and each stage has its share: text encoder, autoencoder,
judge, UNet, evaluation. Stopped at any time, the same command goes on from the last checkpoint; `DIR/out` always holds
the newest pipeline in archives of at most 15 MB (`tar xf` each in one place), the judge, a grid of samples and the
curve. Any cores and any GPU run the same code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from benchmarks.things import evaluate, judge, models, probe, world
from benchmarks.things.run import Run, optimise, pack_folder, save_half, write_atomically
from benchmarks.things.sprites import DataError, load

SEED = 20261126
BATCHES = {"cuda": {"text": 512, "vae": 256, "judge": 512, "unet": 512}, "cpu": dict.fromkeys(("vae", "unet"), 16)}
BATCHES["cpu"] |= {"text": 128, "judge": 48}
RATES = {"text": 1e-3, "vae": 1.5e-3, "judge": 2e-3, "unet": 1e-3}
TOGETHER = 0.2  # the text encoder's learning rate beside the UNet's, once they train together
NO_CAPTION = 0.1  # share of training captions left empty, for guidance


class Trainer:
    """The parts, on their device, and one batch's loss of each stage."""

    denoiser = "unet"  # the stage that trains it

    def __init__(self, run: Run, sprites: Any, *, names: int, batch: int | None) -> None:
        self.run, self.device, self.names = run, run.device, names
        kind = self.device.type
        self.batches = {**BATCHES[kind], **({self.denoiser: batch} if batch else {})}
        self.format = torch.channels_last if kind == "cuda" else torch.contiguous_format
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(SEED)
        self.painter = world.Painter(sprites, self.device, SEED)
        self.looks = self._thumbnails()
        self.pool, self.used = torch.empty(0, world.COLUMNS, dtype=torch.long), 0
        self.bank: tuple[Tensor, Tensor] | None = None
        self.build()

    def build(self) -> None:
        """Make the parts, on the device."""
        self.tokenizer = models.build_tokenizer(self.run.work / "tokenizer")
        self.table = models.CaptionTable(self.tokenizer, self.device)
        self.encoder, self.reader = self._place(models.build_text_encoder(self.tokenizer), models.SceneReader())
        self.vae, self.judge, self.unet = self._place(models.build_vae(), judge.Judge(), models.build_unet())
        self.denoise: Any = self.unet  # or what was compiled from it
        alphas = DDIMScheduler(**models.SCHEDULER).alphas_cumprod
        ratio = alphas / (1 - alphas)
        self.alphas, self.weights = alphas.to(self.device), (ratio.clamp(max=5) / ratio).to(self.device)

    def _place(self, *modules: Any) -> list[Any]:
        return [m.to(self.device, memory_format=self.format) for m in modules]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def seed(self, stage: str) -> None:
        """Random numbers of a stage; another process that resumes it must not repeat the first one's."""
        part = SEED + 1000 * list(self.run.shares).index(stage) + int(self.run.elapsed()) % 1000
        torch.manual_seed(part)
        self.painter.generator.manual_seed(part)
        self.pool, self.used, self.pool_seed = self.pool[:0], 0, part

    def scenes(self, count: int) -> Tensor:
        """Training scenes, never told before, on the device."""
        if self.used + count > len(self.pool):
            self.pool_seed += 100_000
            self.pool = world.sample_scenes(max(8192, 16 * count), self.pool_seed, held=False, names=self.names)
            self.used = 0
        self.used += count
        return self.pool[self.used - count : self.used].to(self.device, non_blocking=True)

    def _thumbnails(self) -> Tensor:
        """How each thing looks in each style: `[N, 2, 144]`."""
        small = nn.functional.adaptive_avg_pool2d(self.painter.sprites.flatten(0, 1), 6).flatten(1)
        return small.reshape(2, -1, models.SceneReader.LOOK).transpose(0, 1)

    def text_loss(self, step: int) -> Tensor:
        scenes = self.scenes(self.batches["text"])
        labels = world.labels(scenes)
        with self.autocast():
            logits, looks = self.reader(self.encoder(self.table(scenes))[0])
        present = (labels["concept"] > 0).float()[..., None]
        target = self.looks[(labels["concept"] - 1).clamp(min=0), labels["style"].clamp(min=0)]
        error = ((looks.float() - target).square() * present).sum() / present.sum() / target.shape[-1]
        return judge.label_loss(logits, labels) + 20 * error

    def vae_loss(self, step: int) -> Tensor:
        pictures = self.painter(self.scenes(self.batches["vae"])).contiguous(memory_format=self.format)
        with self.autocast():
            posterior = self.vae.encode(pictures).latent_dist
            latents = posterior.sample()
            # The denoiser will not hit the latents exactly: let the decoder learn to forgive.
            latents = latents + 0.05 * latents.detach().std() * torch.randn_like(latents)
            output = self.vae.decode(latents).sample
        error = output.float() - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        divergence = posterior.kl().float().mean() / latents[0, 0].numel()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-4 * divergence

    @torch.no_grad()
    def judged_pictures(self, scenes: Tensor) -> Tensor:
        """Pictures of which a third went through the autoencoder, with perturbed latents; all a little noisy."""
        pictures = self.painter(scenes)
        count = len(scenes) // 3
        with self.autocast():
            latents = self.vae.encode(pictures[:count]).latent_dist.mode()
            amount = 0.3 * torch.rand(count, 1, 1, 1, device=self.device)
            again = self.vae.decode(latents + amount * torch.randn_like(latents)).sample
        pictures[:count] = again.float().clamp(-1, 1)
        return pictures + 0.05 * torch.randn_like(pictures)

    def judge_loss(self, step: int) -> Tensor:
        scenes = self.scenes(self.batches["judge"])
        pictures = self.judged_pictures(scenes).contiguous(memory_format=self.format)
        with self.autocast():
            logits = self.judge(pictures)
        return judge.label_loss(logits, world.labels(scenes))

    @torch.no_grad()
    def encode(self, scenes: Tensor) -> Tensor:
        pictures = self.painter(scenes).contiguous(memory_format=self.format)
        with self.autocast():
            return self.vae.encode(pictures).latent_dist.mode().float()

    def fill_bank(self, size: int) -> None:
        """Scenes and their latents; each step of the UNet renews a part of them."""
        scenes = self.scenes(size)
        self.bank = scenes, torch.cat([self.encode(part) for part in scenes.split(512)])

    def draw_batch(self, step: int) -> tuple[Tensor, Tensor]:
        scenes, latents = self.bank  # type: ignore[misc]
        fresh = max(1, self.batches[self.denoiser] // 4)
        start = step * fresh % max(1, len(scenes) - fresh)
        new = self.scenes(fresh)
        scenes[start : start + fresh], latents[start : start + fresh] = new, self.encode(new)
        pick = torch.randint(len(scenes), (self.batches[self.denoiser],), device=self.device)
        return scenes[pick], latents[pick]

    def unet_loss(self, step: int) -> Tensor:
        """Noise prediction with 10 % empty captions and min-SNR-5 weights (Hang et al. 2023)."""
        scenes, clean = self.draw_batch(step)
        noise = torch.randn_like(clean)
        t = torch.randint(len(self.alphas), (len(clean),), device=self.device)
        a = self.alphas[t][:, None, None, None]
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).contiguous(memory_format=self.format)
        dropped = torch.rand(len(clean), 1, device=self.device) < NO_CAPTION
        ids = torch.where(dropped, self.table.empty, self.table(scenes))
        with self.autocast():
            states = self.encoder(ids)[0]
            prediction = self.denoise(noisy, t, states, return_dict=False)[0]
        return (self.weights[t] * (prediction.float() - noise).square().mean((1, 2, 3))).mean()

    @torch.no_grad()
    def draw(self, scenes: Tensor, noise: Tensor, steps: int = evaluate.STEPS) -> Tensor:
        """Pictures of scenes by the UNet as it is, uncompiled, in bf16."""
        noise = noise.contiguous(memory_format=self.format)
        with self.autocast():
            states = self.encoder(torch.cat([self.table(scenes), self.table.empty]))[0]
            told, empty = states[:-1], states[-1:]
            return evaluate.sample(self.unet, self.vae, told, empty, noise, steps=steps, guidance=evaluate.GUIDANCE)

    def save(self, folder: Path) -> None:
        """Write the pipeline as it stands."""
        self.unet.eval(), self.encoder.eval()
        models.save_pipeline(folder, self.unet, self.vae, self.encoder, self.tokenizer)

    def publish(self, count: int, steps: int) -> dict[str, Any]:
        """Write the pipeline, a grid of held-out scenes and the archives as things stand; the grid's accuracy."""
        out = self.run.work / "out"
        self.save(self.run.work / "model")
        pack_folder(self.run.work / "model", out, "model")
        scenes = world.sample_scenes(count, evaluate.SEED, held=True, names=self.names).to(self.device)
        pictures = self.draw(scenes, evaluate.noise_for(count, 0).to(self.device), steps)
        evaluate.save_grid(pictures, out / "grid.png")
        told = "\n".join(world.captions(scenes.cpu())) + "\n"
        write_atomically(out / "grid.txt", lambda p: p.write_text(told))
        return {"grid_accuracy": judge.accuracy([judge.attribute_hits(self.judge, pictures, scenes)])}


def keep_part(trainer: Trainer, name: str, module: nn.Module) -> None:
    torch.save(module.state_dict(), trainer.run.work / f"{name}.partial")
    (trainer.run.work / f"{name}.partial").rename(trainer.run.work / f"{name}.pt")


def stage_text(trainer: Trainer) -> None:
    trainer.seed("text")
    both = {"encoder": trainer.encoder, "reader": trainer.reader}
    rates = dict.fromkeys(both, RATES["text"])
    optimise(trainer.run, "text", both, trainer.text_loss, batch=trainer.batches["text"], rates=rates)
    keep_part(trainer, "text", trainer.encoder)
    with torch.no_grad():
        scenes = world.sample_scenes(512, evaluate.SEED, held=True, names=trainer.names).to(trainer.device)
        logits, _ = trainer.reader(trainer.encoder(trainer.table(scenes))[0])
        labels = world.labels(scenes)
        there = labels["concept"] > 0
        right = (logits["concept"].argmax(-1) == labels["concept"])[there].float().mean().item()
    trainer.run.finish("text", concepts_read_from_states=round(right, 4))


def stage_vae(trainer: Trainer) -> None:
    trainer.seed("vae")
    vae, run = trainer.vae, trainer.run
    batch = trainer.batches["vae"]
    optimise(run, "vae", {"vae": vae}, trainer.vae_loss, batch=batch, rates={"vae": RATES["vae"]}, decay=0.0)
    with torch.no_grad():
        scenes = world.sample_scenes(512, evaluate.SEED, held=True, names=trainer.names)
        pictures = torch.cat([trainer.painter(part) for part in scenes.split(64)])
        models.standardise_latents(vae, torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(64)]))
        latents = torch.cat([vae.encode(p).latent_dist.mode() for p in pictures.split(64)])
        again = torch.cat([vae.decode(z).sample for z in latents.split(64)]).clamp(-1, 1)
    error = (again - pictures).square().mean()
    keep_part(trainer, "vae", vae)
    evaluate.save_grid(torch.stack([pictures[:16], again[:16]], 1).flatten(0, 1), run.work / "vae.png")
    figures = {"psnr_db": round(10 * torch.log10(4 / error).item(), 2), "latent_mean": round(latents.mean().item(), 4)}
    run.finish("vae", **figures, latent_deviation=round(latents.std().item(), 4))


def stage_judge(trainer: Trainer) -> None:
    trainer.seed("judge")
    batch, run = trainer.batches["judge"], trainer.run
    optimise(run, "judge", {"judge": trainer.judge}, trainer.judge_loss, batch=batch, rates={"judge": RATES["judge"]})
    keep_part(trainer, "judge", trainer.judge)
    save_half(run.work / "judge.safetensors", trainer.judge)
    save_half(run.work / "out" / "judge.safetensors", trainer.judge)

    def again(scenes: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return trainer.vae.decode(trainer.vae.encode(trainer.painter(scenes)).latent_dist.mode()).sample.clamp(
                -1, 1
            )

    count = {"count": 1024 if trainer.device.type == "cuda" else 192, "batch": 64, "names": trainer.names}
    rendered = evaluate.measure(lambda scenes, noise: trainer.painter(scenes), trainer.judge, **count)
    run.finish("judge", on_rendered=rendered, through_vae=evaluate.measure(again, trainer.judge, **count))


def stage_unet(trainer: Trainer, *, bank: int, compiled: bool) -> None:
    trainer.seed("unet")
    trainer.fill_bank(bank)
    if compiled:
        probe.compile_unet(trainer)
    both = {"unet": trainer.unet, "encoder": trainer.encoder}
    rates = {"unet": RATES["unet"], "encoder": RATES["unet"] * TOGETHER}
    cuda = trainer.device.type == "cuda"
    quick = (48, 25) if cuda else (4, 8)
    optimise(
        trainer.run,
        "unet",
        both,
        trainer.unet_loss,
        batch=trainer.batches["unet"],
        rates=rates,
        at_checkpoint=lambda: trainer.publish(*quick),
    )
    trainer.run.finish("unet", **trainer.publish(*quick))


def stage_evaluate(trainer: Trainer, count: int) -> None:
    run = trainer.run
    left = max(10.0, (run.budget - run.elapsed()) * 0.7) if run.samples is None else 1e9
    batch = 256 if trainer.device.type == "cuda" else 8
    measured = evaluate.measure(trainer.draw, trainer.judge, count, batch=batch, seconds=left, names=trainer.names)
    scenes = world.sample_scenes(128, evaluate.SEED + 1, held=True, names=trainer.names)[: 4 * batch].to(trainer.device)
    run.finish("evaluate", caption_accuracy=measured, skipped_blocks=probe.skipped_blocks(trainer, scenes))


def restore(trainer: Trainer) -> None:
    """What earlier processes finished, and of the UNet its newest checkpoint once it is done."""
    parts = {"text": trainer.encoder, "vae": trainer.vae, "judge": trainer.judge}
    for name, module in parts.items():
        if trainer.run.done(name):
            module.load_state_dict(load_part(trainer, name))
            module.eval()
    if trainer.run.done("vae"):
        trainer.vae.register_to_config(scaling_factor=1.0)
    if trainer.run.done("unet"):
        state = torch.load(trainer.run.work / "unet.checkpoint", weights_only=True, map_location=trainer.device)
        trainer.unet.load_state_dict(state["unet"])
        trainer.encoder.load_state_dict(state["encoder"])
        trainer.unet.eval()


def load_part(trainer: Trainer, name: str) -> dict[str, Tensor]:
    return torch.load(trainer.run.work / f"{name}.pt", weights_only=True, map_location=trainer.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=Path("runs/things/sprites.npz"))
    parser.add_argument("--work", type=Path, default=Path("runs/things/train"))
    parser.add_argument("--minutes", type=float, default=11.0, help="the whole run's time")
    parser.add_argument("--samples", type=int, help="the UNet's samples, instead of time; other stages in proportion")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--batch", type=int, help="the UNet's batch (default: 512 on a GPU, 16 on cores)")
    parser.add_argument("--compile", action="store_true", help="compile the UNet; eager if that fails")
    parser.add_argument("--names", type=int, default=len(world.NAMES), help="train on the first N things alone")
    parser.add_argument("--tiny", action="store_true", help="a small bank and evaluation, to try the script")
    parser.add_argument("--probe", action="store_true", help="measure speeds and memory, train nothing")
    parser.add_argument("--evaluation", type=int, help="pictures of the evaluation (default: 2048, on cores 192)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise DataError("no CUDA device; use --device cpu")
    cuda = arguments.device == "cuda"
    sprites = load(arguments.sprites)
    run = Run(arguments.work, arguments.minutes, arguments.samples, arguments.device)
    trainer = Trainer(run, sprites, names=arguments.names, batch=arguments.batch)
    if arguments.tiny:
        trainer.batches = {"text": 32, "vae": 4, "judge": 8, "unet": arguments.batch or 4}
    if arguments.probe:
        probe.report(trainer, compiled=arguments.compile)
        return 0
    restore(trainer)
    sizes = {"bank": 128, "count": 16} if arguments.tiny else {"bank": 4096, "count": 192}
    if cuda and not arguments.tiny:
        sizes = {"bank": 131_072, "count": 2048}
    stages = {
        "text": lambda: stage_text(trainer),
        "vae": lambda: stage_vae(trainer),
        "judge": lambda: stage_judge(trainer),
        "unet": lambda: stage_unet(trainer, bank=sizes["bank"], compiled=arguments.compile),
        "evaluate": lambda: stage_evaluate(trainer, arguments.evaluation or sizes["count"]),
    }
    for name, stage in stages.items():
        if not run.done(name):
            stage()
    print(f"trained in {run.elapsed() / 60:.1f} minutes -> {run.work / 'model'}, {run.work / 'out'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

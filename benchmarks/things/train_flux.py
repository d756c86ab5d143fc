"""Train a small Flux of the things world: `python -m benchmarks.things.train_flux --sprites FILE --work DIR`.

The autoencoder, CLIP and the judge are those of `python -m benchmarks.things.train`, as committed. Stages: T5, alone;
the transformer, with T5 beside it; evaluation. Stopped at any time, the same command goes on from the last checkpoint;
`DIR/out` always holds the newest pipeline in archives of at most 15 MB, a grid of samples and the curve.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.things import evaluate, flux_models, judge, models, train, world
from benchmarks.things.run import Run, optimise, set_training
from benchmarks.things.sprites import DataError, load

SHARES = {"text": 0.06, "flux": 0.88, "evaluate": 0.06}
SAMPLES = {"text": 0.15, "flux": 1.0}
BATCHES = {"cuda": {"text": 512, "flux": 512}, "cpu": {"text": 64, "flux": 16}}
RATES = {"text": 1e-3, "flux": 1e-3}
MEMORY = 0.999  # of the running mean of weights, which makes the pictures


class FluxTrainer(train.Trainer):
    """The parts, on their device, and one batch's loss of each stage."""

    denoiser = "flux"

    def build(self) -> None:
        # On an H200 with torch 2.11.0+cu130, cuDNN's attention ended in an illegal memory access within a few steps.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.batches |= {k: v for k, v in BATCHES[self.device.type].items() if k == "text" or k not in self.batches}
        self.tokenizer = flux_models.build_tokenizer(self.run.work / "tokenizer_2")
        self.table = models.CaptionTable(self.tokenizer, self.device)
        vae, clip = flux_models.load_base()
        self.encoder, self.reader = self._place(flux_models.build_text_encoder(self.tokenizer), models.SceneReader())
        self.vae, self.clip = self._place(vae, clip)
        self.judge, self.flux = self._place(
            judge.load(Path(judge.__file__).with_name("judge.safetensors")), flux_models.build_transformer()
        )
        names = models.load_tokenizer(flux_models.BASE / "tokenizer")
        self.clip_table = models.CaptionTable(names, self.device)
        self.where = flux_models.positions(self.device)
        self.start_mean()

    def start_mean(self) -> None:
        """The running mean begins at the weights as they are."""
        self.mean_flux, self.mean_encoder = (copy.deepcopy(m).requires_grad_(False) for m in (self.flux, self.encoder))

    def flux_loss(self, step: int) -> Tensor:
        """Rectified flow at logit-normal times (Esser et al. 2024), with 10 % empty captions."""
        if step:
            self.update_mean(step)
        scenes, clean = self.draw_batch(step)
        noise = torch.randn_like(clean)
        sigma = torch.randn(len(clean), device=self.device).sigmoid()
        s = sigma[:, None, None, None]
        noisy = flux_models.pack((1 - s) * clean + s * noise)
        dropped = torch.rand(len(clean), 1, device=self.device) < train.NO_CAPTION
        ids = torch.where(dropped, self.table.empty, self.table(scenes))
        clip_ids = torch.where(dropped, self.clip_table.empty, self.clip_table(scenes))
        with self.autocast():
            with torch.no_grad():
                pooled = self.clip(clip_ids).pooler_output
            velocity = self.flux(
                hidden_states=noisy,
                timestep=sigma,
                encoder_hidden_states=self.encoder(ids)[0],
                pooled_projections=pooled,
                return_dict=False,
                **self.where,
            )[0]
        return (velocity.float() - flux_models.pack(noise - clean)).square().mean()

    @torch.no_grad()
    def update_mean(self, step: int) -> None:
        share = 1 - min(MEMORY, (1 + step) / (10 + step))
        for mean, module in ((self.mean_flux, self.flux), (self.mean_encoder, self.encoder)):
            torch._foreach_lerp_(list(mean.parameters()), list(module.parameters()), share)

    @torch.no_grad()
    def read_text(self, scenes: Tensor) -> tuple[Tensor, Tensor]:
        """T5's states and CLIP's pooled ones of scenes, and of the empty caption as the last row."""
        ids, clip_ids = (torch.cat([t(scenes), t.empty]) for t in (self.table, self.clip_table))
        return self.mean_encoder(ids)[0].float(), self.clip(clip_ids).pooler_output.float()

    @torch.no_grad()
    def draw(self, scenes: Tensor, noise: Tensor, steps: int = evaluate.STEPS) -> Tensor:
        """Pictures of scenes by the running mean of the weights, in bf16."""
        with self.autocast():
            text = self.read_text(scenes)
            options: Any = {"steps": steps, "guidance": evaluate.GUIDANCE}
            return flux_models.sample(self.mean_flux, self.vae, text, noise, **options)

    def save(self, folder: Path) -> None:
        flux_models.save_pipeline(folder, self.mean_flux, self.mean_encoder, self.run.work / "tokenizer_2")


def compile_blocks(trainer: FluxTrainer) -> None:
    """Compile the transformer's blocks, tried on a batch first; eager stays when that raises.

    Each of the two kinds of block is compiled once, which takes a fraction of what the whole model does.
    """
    began = time.time()
    blocks = [*trainer.flux.transformer_blocks, *trainer.flux.single_transformer_blocks]
    try:
        for block in blocks:
            block.compile(dynamic=False)
        loss = trainer.flux_loss(0)
        loss.backward()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the compiled blocks give a loss of {loss.item()}")
    except Exception as error:
        torch._dynamo.reset()
        for block in blocks:
            block._compiled_call_impl = None
        print(f"compiling failed, eager instead: {type(error).__name__}: {str(error)[:300]}", flush=True)
    finally:
        trainer.flux.zero_grad(set_to_none=True)
        trainer.encoder.zero_grad(set_to_none=True)
    print(f"compiling took {time.time() - began:.0f} s", flush=True)


def stage_flux(trainer: FluxTrainer, *, bank: int, compiled: bool) -> None:
    trainer.seed("flux")
    trainer.start_mean()
    trainer.fill_bank(bank)
    trained: dict[str, nn.Module] = {"flux": trainer.flux, "encoder": trainer.encoder}
    set_training(trained, True)
    if compiled:
        compile_blocks(trainer)
    quick = (48, 25) if trainer.device.type == "cuda" else (4, 8)
    optimise(
        trainer.run,
        "flux",
        trained,
        trainer.flux_loss,
        batch=trainer.batches["flux"],
        rates={"flux": RATES["flux"], "encoder": RATES["flux"] * train.TOGETHER},
        at_checkpoint=lambda: trainer.publish(*quick),
        beside={"mean_flux": trainer.mean_flux, "mean_encoder": trainer.mean_encoder},
    )
    trainer.run.finish("flux", **trainer.publish(*quick))


def stage_evaluate(trainer: FluxTrainer, count: int) -> None:
    run = trainer.run
    left = max(10.0, (run.budget - run.elapsed()) * 0.7) if run.samples is None else 1e9
    batch = 256 if trainer.device.type == "cuda" else 8
    scenes = world.sample_scenes(128, evaluate.SEED + 1, held=True, names=trainer.names)[: 4 * batch].to(trainer.device)
    text = trainer.read_text(scenes)
    clean, noise = trainer.encode(scenes), evaluate.noise_for(len(scenes), 0).to(trainer.device)
    skipped = flux_models.skipped_blocks(trainer.mean_flux, clean, (text[0][:-1], text[1][:-1]), noise)
    measured = evaluate.measure(trainer.draw, trainer.judge, count, batch=batch, seconds=left, names=trainer.names)
    run.finish("evaluate", caption_accuracy=measured, skipped_blocks=skipped)


def restore(trainer: FluxTrainer) -> None:
    """What earlier processes finished."""
    if trainer.run.done("text"):
        trainer.encoder.load_state_dict(train.load_part(trainer, "text"))
    if trainer.run.done("flux"):
        state = torch.load(trainer.run.work / "flux.checkpoint", weights_only=True, map_location=trainer.device)
        trainer.mean_flux.load_state_dict(state["mean_flux"])
        trainer.mean_encoder.load_state_dict(state["mean_encoder"])


def start_from(trainer: FluxTrainer, folder: Path) -> None:
    """Weights of a pipeline that was trained before; T5's own stage is then done."""
    trainer.flux.load_state_dict(type(trainer.flux).from_pretrained(folder / "transformer").state_dict())
    trainer.encoder.load_state_dict(type(trainer.encoder).from_pretrained(folder / "text_encoder_2").state_dict())
    train.keep_part(trainer, "text", trainer.encoder)
    trainer.run.state["done"].append("text")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, default=Path("runs/things/sprites.npz"))
    parser.add_argument("--work", type=Path, default=Path("runs/things/flux"))
    parser.add_argument("--minutes", type=float, default=6.5, help="the whole run's time")
    parser.add_argument("--samples", type=int, help="the transformer's samples, instead of time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--batch", type=int, help="the transformer's batch (default: 512 on a GPU, 16 on cores)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks; eager if that fails")
    parser.add_argument("--names", type=int, default=len(world.NAMES), help="train on the first N things alone")
    parser.add_argument("--start", type=Path, help="go on from this pipeline's weights")
    parser.add_argument("--tiny", action="store_true", help="a small bank and evaluation, to try the script")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise DataError("no CUDA device; use --device cpu")
    run = Run(arguments.work, arguments.minutes, arguments.samples, arguments.device, SHARES, SAMPLES)
    trainer = FluxTrainer(run, load(arguments.sprites), names=arguments.names, batch=arguments.batch)
    if arguments.tiny:
        trainer.batches |= {"text": 32, "flux": arguments.batch or 4}
    counts = {n: sum(p.numel() for p in getattr(trainer, n).parameters()) for n in ("flux", "encoder", "clip", "vae")}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"{device}, torch {torch.__version__}, parameters {counts}", flush=True)
    if arguments.start and not run.done("text"):
        start_from(trainer, arguments.start)
    restore(trainer)
    bank, count = (128, 16) if arguments.tiny else (131_072, 2048) if cuda else (4096, 192)
    stages = {
        "text": lambda: train.stage_text(trainer),
        "flux": lambda: stage_flux(trainer, bank=bank, compiled=arguments.compile),
        "evaluate": lambda: stage_evaluate(trainer, count),
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

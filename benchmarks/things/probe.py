"""What a machine does with the training: speeds, memory, compilation; and what each transformer block does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.things import evaluate

if TYPE_CHECKING:
    from benchmarks.things.train import Trainer


def _synchronise(trainer: Trainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def _speed(trainer: Trainer, work: Callable[[], Any], samples: int, seconds: float) -> float:
    """Samples a second, after one round that is not counted."""
    work()
    _synchronise(trainer)
    began, rounds = time.time(), 0
    while rounds < 2 or time.time() - began < seconds:
        work()
        rounds += 1
        if rounds % 5 == 0:
            _synchronise(trainer)
    _synchronise(trainer)
    return round(rounds * samples / (time.time() - began), 1)


def compile_unet(trainer: Trainer) -> float | None:
    """Let the trainer use a compiled UNet, tried on a batch first; eager stays when that raises. Seconds it took."""
    began = time.time()
    try:
        trainer.unet.train(), trainer.encoder.train()
        trainer.denoise = torch.compile(trainer.unet, dynamic=False)
        trainer.unet_loss(0).backward()
        _synchronise(trainer)
    except Exception as error:
        torch._dynamo.reset()
        trainer.denoise = trainer.unet
        print(f"compiling failed, eager instead: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return None
    finally:
        trainer.unet.zero_grad(set_to_none=True)
        trainer.encoder.zero_grad(set_to_none=True)
    print(f"compiled in {time.time() - began:.0f} s", flush=True)
    return time.time() - began


def report(trainer: Trainer, *, compiled: bool, seconds: float = 2.0) -> None:
    """Print samples a second of every stage, and of the UNet by batch."""
    cuda = trainer.device.type == "cuda"

    def say(**figures: Any) -> None:
        memory = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if cuda else {}
        print(json.dumps({**figures, **memory}), flush=True)

    def training(loss_of: Callable[[int], Tensor], *modules: nn.Module) -> Callable[[], None]:
        parameters = [p for m in modules for p in m.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=0.0, fused=cuda)

        def work() -> None:
            loss_of(0).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return work

    say(device=torch.cuda.get_device_name() if cuda else "cpu", torch=torch.__version__)
    parts = ("unet", "vae", "encoder", "judge")
    say(parameters={name: sum(p.numel() for p in getattr(trainer, name).parameters()) for name in parts})
    trainer.seed("text")
    many = 512 if cuda else 64
    scenes = trainer.scenes(many)
    say(stage="render", samples_per_s=_speed(trainer, lambda: trainer.painter(scenes), many, seconds / 2))
    say(stage="encode", samples_per_s=_speed(trainer, lambda: trainer.encode(scenes), many, seconds / 2))
    for name, modules in (
        ("text", (trainer.encoder, trainer.reader)),
        ("vae", (trainer.vae,)),
        ("judge", (trainer.judge,)),
    ):
        work = training(getattr(trainer, f"{name}_loss"), *modules)
        batch = trainer.batches[name]
        say(stage=name, batch=batch, samples_per_s=_speed(trainer, work, batch, seconds))
    trainer.fill_bank(4096 if cuda else 64)
    chosen = trainer.batches["unet"]
    for batch in (256, 512, 1024) if cuda else (chosen,):
        trainer.batches["unet"] = batch
        work = training(trainer.unet_loss, trainer.unet, trainer.encoder)
        say(stage="unet", batch=batch, samples_per_s=_speed(trainer, work, batch, seconds))
    count = 256 if cuda else 2
    some, noise = trainer.scenes(count), evaluate.noise_for(count, 0).to(trainer.device)
    say(stage="sample", steps=10, pictures_per_s=_speed(trainer, lambda: trainer.draw(some, noise, 10), count, 0))
    trainer.batches["unet"] = chosen
    if compiled and (took := compile_unet(trainer)) is not None:
        work = training(trainer.unet_loss, trainer.unet, trainer.encoder)
        speed = _speed(trainer, work, chosen, seconds)
        say(stage="unet", batch=chosen, compiled=True, compile_s=round(took, 1), samples_per_s=speed)


@torch.no_grad()
def skipped_blocks(trainer: Trainer, scenes: Tensor) -> dict[str, float]:
    """Relative mean squared change of the noise prediction when one transformer block alone is passed by.

    Measured on noisy latents of `scenes` at eight times of the schedule. A dead block changes nothing.
    """
    clean, states = trainer.encode(scenes), trainer.encoder(trainer.table(scenes))[0]
    generator = torch.Generator().manual_seed(evaluate.SEED)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    t = (torch.arange(len(scenes), device=clean.device) % 8) * 125 + 62
    a = trainer.alphas[t][:, None, None, None]
    noisy = a.sqrt() * clean + (1 - a).sqrt() * noise

    def predict() -> Tensor:
        return trainer.unet(noisy, t, states, return_dict=False)[0]

    usual, changes = predict(), {}
    for name, module in trainer.unet.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            handle = module.register_forward_hook(lambda _module, inputs, _output: inputs[0])
            changes[name] = ((predict() - usual).square().mean() / usual.square().mean()).item()
            handle.remove()
    return {name: float(f"{change:.3g}") for name, change in changes.items()}

"""A training run against the clock: stages with shares of a budget, checkpoints, resuming, and what to bring home."""

from __future__ import annotations

import json
import math
import os
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# Each stage's share of the time, in order; a stage that ends late takes from the ones after it.
SHARES = {"text": 0.04, "vae": 0.14, "judge": 0.12, "unet": 0.65, "evaluate": 0.05}
# With a budget of samples: each stage's samples for one of the UNet's.
SAMPLES = {"text": 0.3, "vae": 0.1, "judge": 0.25, "unet": 1.0}
CHECKPOINT_SECONDS = 45.0
PART_BYTES = 15_000_000  # of a file that is brought home


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


class Run:
    """Where a run stands. The clock counts this process and, from the last checkpoint, the ones before it."""

    def __init__(
        self,
        work: Path,
        minutes: float,
        samples: int | None,
        device: str,
        shares: Mapping[str, float] = SHARES,
        relative: Mapping[str, float] = SAMPLES,
    ) -> None:
        """`shares` and `relative` are of this run's stages, as `SHARES` and `SAMPLES` are of the UNet's."""
        self.work, self.budget, self.samples, self.device = work, minutes * 60, samples, torch.device(device)
        self.shares, self.relative = shares, relative
        work.mkdir(parents=True, exist_ok=True)
        (work / "out").mkdir(exist_ok=True)
        self._file = work / "state.json"
        self.state: dict[str, Any] = {"elapsed": 0.0, "started": {}, "done": [], "curve": [], "figures": {}}
        if self._file.exists():
            self.state = json.loads(self._file.read_text())
        self._began = time.time() - self.state["elapsed"]

    def elapsed(self) -> float:
        return time.time() - self._began

    def save(self) -> None:
        self.state["elapsed"] = self.elapsed()
        write_atomically(self._file, lambda p: p.write_text(json.dumps(self.state)))
        report = {key: self.state[key] for key in ("elapsed", "started", "done", "figures", "curve")}
        write_atomically(self.work / "out" / "curve.json", lambda p: p.write_text(json.dumps(report, indent=1)))

    def deadline(self, stage: str) -> float:
        """Seconds of the run at which the stage must end."""
        names = list(self.shares)
        return self.budget * sum(self.shares[name] for name in names[: names.index(stage) + 1])

    def start(self, stage: str) -> None:
        self.state["started"].setdefault(stage, self.elapsed())

    def progress(self, stage: str, seen: int) -> float:
        """How much of the stage's budget is used, from 0 to 1 and beyond; `seen` counts its samples."""
        if self.samples is not None:
            return seen / (self.samples * self.relative[stage])
        begin = self.state["started"][stage]
        # A stage that began after its deadline still gets a tenth of its share.
        length = max(self.deadline(stage) - begin, 0.1 * self.shares[stage] * self.budget)
        return (self.elapsed() - begin) / length

    def done(self, stage: str) -> bool:
        return stage in self.state["done"]

    def finish(self, stage: str, **figures: Any) -> None:
        self.state["done"].append(stage)
        self.state["figures"].setdefault(stage, {}).update(figures)
        self.save()
        print(f"[{self.elapsed():6.0f} s] {stage} done {json.dumps(figures)}", flush=True)

    def log(self, stage: str, **figures: Any) -> None:
        row = {"stage": stage, "seconds": round(self.elapsed(), 1), **figures}
        self.state["curve"].append(row)
        print(f"[{row['seconds']:6.0f} s] {stage} " + json.dumps(figures), flush=True)


def learning_rate(peak: float, progress: float) -> float:
    """Up over the first 2 %, flat, and down to nothing over the second half."""
    return peak * max(0.0, min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.5))


@dataclass
class Checkpoint:
    """A stage's modules and optimiser, and the file that they are kept in."""

    file: Path
    modules: dict[str, nn.Module]
    optimiser: torch.optim.Optimizer
    device: torch.device

    def restore(self) -> int:
        """Load what was kept; the step that it was kept at."""
        state = torch.load(self.file, weights_only=True, map_location=self.device)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        return int(state["step"])

    def go_back(self, stage: str) -> int:
        """Load what was kept, after a loss that is not a number; the step that it was kept at.

        Raises:
            RuntimeError: if nothing was kept.
        """
        if not self.file.exists():
            raise RuntimeError(f"{stage}: the loss is not a number, and there is no checkpoint to go back to")
        step = self.restore()
        print(f"{stage}: the loss is not a number; back to step {step}", flush=True)
        return step

    def keep(self, step: int) -> None:
        state: dict[str, Any] = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimiser": self.optimiser.state_dict(), "step": step}
        write_atomically(self.file, lambda p: torch.save(state, p))


class Meter:
    """Losses since it was last reset, summed on the device so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.total, self.steps, self.since = torch.zeros((), device=self.device), 0, time.time()

    def add(self, loss: Tensor) -> None:
        self.total, self.steps = self.total + loss.detach(), self.steps + 1

    def is_due(self) -> bool:
        return self.steps >= 100 or time.time() - self.since > 15

    def read(self) -> tuple[float, float]:
        """Mean loss, and steps per second."""
        return self.total.item() / self.steps, self.steps / (time.time() - self.since)


def optimise(
    run: Run,
    stage: str,
    modules: dict[str, nn.Module],
    loss_of: Callable[[int], Tensor],
    *,
    batch: int,
    rates: dict[str, float],
    decay: float = 0.01,
    at_checkpoint: Callable[[], dict[str, Any]] | None = None,
    beside: dict[str, nn.Module] | None = None,
) -> None:
    """Train `modules` until the stage's budget is used, from its checkpoint if there is one.

    `loss_of(step)` computes one batch's loss; `rates` holds each module's peak learning rate. What is `beside` them
    (a running mean of their weights, say) is kept in the checkpoint and not trained.
    """
    cuda = run.device.type == "cuda"
    groups: list[dict[str, Any]] = [
        {"params": list(m.parameters()), "peak": rates[name], "lr": 0.0} for name, m in modules.items()
    ]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=decay, fused=cuda)
    parameters = [p for group in groups for p in group["params"]]
    kept_modules = {**modules, **(beside or {})}
    checkpoint, step = Checkpoint(run.work / f"{stage}.checkpoint", kept_modules, optimiser, run.device), 0
    if checkpoint.file.exists():
        step = checkpoint.restore()
        print(f"[{run.elapsed():6.0f} s] {stage} resumes at step {step}", flush=True)
    run.start(stage)
    set_training(modules, True)
    meter, kept = Meter(run.device), time.time()
    while (progress := run.progress(stage, step * batch)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(group["peak"], progress)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        meter.add(loss)
        step += 1
        if step % 20 == 0 and cuda:
            torch.cuda.synchronize()  # or the clock would run behind the device
        due = time.time() - kept > CHECKPOINT_SECONDS
        if due or meter.is_due():  # before a checkpoint, too: one of weights that are not numbers would stay
            mean, speed = meter.read()
            if math.isfinite(mean):
                run.log(stage, step=step, loss=round(mean, 5), samples_per_s=round(speed * batch, 1))
            else:
                step = checkpoint.go_back(stage)
                due = False
            meter.reset()
        if due:
            checkpoint.keep(step)
            run.save()
            if at_checkpoint:
                run.log(stage, step=step, **at_checkpoint())
                set_training(modules, True)
            meter.reset()
            kept = time.time()
    if meter.steps and not math.isfinite(meter.read()[0]):
        step = checkpoint.go_back(stage)
    checkpoint.keep(step)
    run.save()
    run.log(stage, step=step, samples=step * batch)
    set_training(modules, False)


def set_training(modules: dict[str, nn.Module], training: bool) -> None:
    for module in modules.values():
        module.train(training)


def save_half(path: Path, module: nn.Module) -> None:
    """Write a module's weights as fp16."""
    state = {n: (t.half() if t.is_floating_point() else t).cpu().contiguous() for n, t in module.state_dict().items()}
    write_atomically(path, lambda p: save_file(state, p))


def pack_folder(folder: Path, out: Path, name: str) -> None:
    """The folder's files as archives `name-1.tar`, `name-2.tar`, ... of at most 15 MB each (a file is never split)."""
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: -f.stat().st_size)
    parts: list[list[Path]] = []
    for file in files:
        fits = (p for p in parts if sum(f.stat().st_size + 1024 for f in [*p, file]) < PART_BYTES)
        part = next(fits, None)
        if part is None:
            parts.append(part := [])
        part.append(file)

    def write(members: list[Path]) -> Callable[[Path], object]:
        def to(path: Path) -> None:
            with tarfile.open(path, "w") as archive:
                for file in members:
                    archive.add(file, file.relative_to(folder.parent).as_posix())

        return to

    for number, members in enumerate(parts, 1):
        write_atomically(out / f"{name}-{number}.tar", write(members))

"""What whole blocks and layers carry: what leaving one out does to the noise prediction, its mean kept or not.

`python -m benchmarks.depth` leaves out each transformer block of the embedded model, and within it each attention and
feed-forward, one at a time. Where there is dead depth, any method that finds it looks good: figures have to be shown
without it, too. `python -m benchmarks.things.slim_flux --methods depth` holds blocks that go against ranks.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from exporters.machine import machine_name
from slimdiff import embedded
from slimdiff.denoising.trajectory import Call, predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.progress import bar
from slimdiff.settings import Sampling

DEAD = 1e-4
"""Relative mean squared change of the noise prediction below which a block would be called dead."""


class Stream(NamedTuple):
    """One output of a block or layer.

    Attributes:
        source: name of the argument that it is the sum of, and what was added; of a layer, one of its shape.
        mean: of what was added, over images, tokens, times and both branches of guidance, `[C]`. Gates that depend on
            the time are within.
    """

    source: str
    mean: Tensor


def is_block(module: nn.Module) -> bool:
    """Whether a module is a residual block: it has attention and is none."""
    return not hasattr(module, "processor") and any(hasattr(child, "processor") for child in module.children())


def blocks(denoiser: nn.Module) -> list[str]:
    """Paths of the residual transformer blocks: the members of lists that have an attention."""
    lists = [(path, module) for path, module in denoiser.named_modules() if isinstance(module, nn.ModuleList)]
    return [f"{path}.{name}" for path, members in lists for name, m in members.named_children() if is_block(m)]


def depths(denoiser: nn.Module) -> list[str]:
    """Paths of the blocks, each followed by its attentions and feed-forwards."""
    paths = []
    for path in blocks(denoiser):
        named = denoiser.get_submodule(path).named_children()
        kept = [n for n, m in named if hasattr(m, "processor") or isinstance(m, FeedForward) or n == "act_mlp"]
        paths += [path, *(f"{path}.{name}" for name in kept)]
    return paths


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    found = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@torch.no_grad()
def mean_changes(denoiser: nn.Module, paths: Sequence[str], calls: Sequence[Call]) -> dict[str, list[Stream]]:
    """By path, the outputs of each block or layer with what it adds on average."""
    sums: dict[str, list[tuple[str, Tensor, int]]] = {}

    def add(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, streams = _bound(module, args, kwargs), []
        for number, out in enumerate((output,) if isinstance(output, Tensor) else output):
            alike = {name: x for name, x in given.items() if x.shape == out.shape}
            source = min(alike, key=lambda name: float((out - alike[name]).square().sum()))
            change = (out - alike[source] if is_block(module) else out).double().flatten(0, -2)
            if path in sums:
                source, total, tokens = sums[path][number]
                streams.append((source, total + change.sum(0), tokens + len(change)))
            else:
                streams.append((source, change.sum(0), len(change)))
        sums[path] = streams

    with ExitStack() as stack:
        for path in paths:
            hook = lambda *seen, path=path: add(path, *seen)  # noqa: E731
            stack.enter_context(denoiser.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        for call in bar(calls, "means", "call"):
            predict(denoiser, call)
    ran = [path for path in paths if path in sums]
    return {path: [Stream(name, (total / tokens).float()) for name, total, tokens in sums[path]] for path in ran}


def leave_out(module: nn.Module, streams: Sequence[Stream], *, mean: bool = True) -> None:
    """A block gives out what it receives, and its mean change; a layer its mean alone, or nothing."""
    whole = is_block(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given, outputs = _bound(module, args, kwargs), []
        for stream in streams:
            x = given[stream.source] if whole else torch.zeros_like(given[stream.source])
            outputs.append(x + stream.mean.to(x) if mean else x)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    module.forward = forward  # type: ignore[method-assign]


@contextmanager
def left_out(module: nn.Module, streams: Sequence[Stream], *, mean: bool = True) -> Iterator[None]:
    """`leave_out` for the length of a block."""
    leave_out(module, streams, mean=mean)
    try:
        yield
    finally:
        del module.forward


class Depth:
    """One denoiser, what its blocks add on average, and the calls that it is measured on without them."""

    def __init__(self, denoiser: nn.Module, seen: Sequence[Call], calls: Sequence[Call]) -> None:
        self.denoiser, self.calls = denoiser, calls
        self.changes = mean_changes(denoiser, depths(denoiser), seen)
        reference: dict[int, Tensor] = {id(call): predict(denoiser, call) for call in calls}
        self._dense: Callable[[Call], Tensor] = lambda call: reference[id(call)]

    def error(self, paths: Sequence[str], *, mean: bool = True) -> float:
        """Relative mean squared change of the noise prediction without these blocks or layers."""
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(left_out(self.denoiser.get_submodule(path), self.changes[path], mean=mean))
            return float(
                noise_error(self._dense, lambda call: predict(self.denoiser, call), self.calls)["relative_mse"]
            )

    def alone(self, *, mean: bool = True) -> dict[str, float]:
        """Without each block and layer, one at a time, by path."""
        return {path: self.error([path], mean=mean) for path in bar(list(self.changes), "depth", "block")}

    def least(self, count: int, among: Sequence[str]) -> list[str]:
        """This many blocks whose absence changes least, each chosen beside those before."""
        gone: list[str] = []
        while len(gone) < count:
            left = [path for path in among if path not in gone]
            gone.append(min(left, key=lambda path: self.error([*gone, path])))
        return gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=16, help="whose trajectories are taken (default: %(default)s)")
    args = parser.parse_args()
    pipeline = load_pipeline("demo")
    sampling = Sampling(steps=20, batch=16, seed=50_000)
    calls = record_calls(pipeline, embedded.captions(args.captions, 2, held_out=True), sampling, every=2)
    known = record_calls(pipeline, embedded.captions(args.captions, 1), sampling.model_copy(update={"seed": 0}))
    depth = Depth(pipeline.unet, known, calls)
    without, errors = depth.alone(mean=False), depth.alone()
    print("| left out | noise-prediction error | its mean kept |\n| --- | --- | --- |")
    for path, error in sorted(without.items(), key=lambda item: item[1]):
        print(f"| {path} | {error:.1e} | {errors[path]:.1e} |")
    dead = sum(error < DEAD for error in without.values())
    print(f"\n{dead} of {len(without)} change the noise prediction by less than {DEAD:g}.")
    print(f"{args.captions} captions; {machine_name()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()

"""Whether the embedded model has dead depth: blocks that can be left out whole at next to no error.

`python -m benchmarks.depth` leaves out each transformer block, and within it each attention and feed-forward, one at a
time, and prints what that does to the noise prediction. Where there is dead depth, any method that finds it looks good:
figures have to be told without it, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from exporters.machine import machine_name
from slimdiff import embedded
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.progress import bar
from slimdiff.settings import Sampling

DEAD = 1e-4
"""Relative mean squared change of the noise prediction below which a block would be called dead."""


@contextmanager
def left_out(module: nn.Module) -> Iterator[None]:
    """A block gives out what it is given; a layer of a residual branch gives out nothing."""
    whole = isinstance(module, BasicTransformerBlock)

    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states if whole else torch.zeros_like(hidden_states)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def depths(denoiser: nn.Module) -> list[str]:
    """Paths of transformer blocks, each followed by those of its attentions and feed-forward."""
    found = []
    for path, module in denoiser.named_modules():
        if isinstance(module, BasicTransformerBlock):
            found += [path, *(f"{path}.{name}" for name in ("attn1", "attn2", "ff") if getattr(module, name, None))]
    return found


def measure(denoiser: nn.Module, calls: list[Any]) -> dict[str, float]:
    """Relative mean squared change of the noise prediction without each, by path."""
    reference: dict[int, Tensor] = {id(call): predict(denoiser, call) for call in calls}
    dense: Callable[[Any], Tensor] = lambda call: reference[id(call)]  # noqa: E731
    errors = {}
    for path in bar(depths(denoiser), "depth", "block"):
        with left_out(denoiser.get_submodule(path)):
            errors[path] = float(noise_error(dense, lambda call: predict(denoiser, call), calls)["relative_mse"])
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=16, help="whose trajectories are taken (default: %(default)s)")
    args = parser.parse_args()
    pipeline = load_pipeline("demo")
    sampling = Sampling(steps=20, batch=16, seed=50_000)
    calls = record_calls(pipeline, embedded.captions(args.captions, 2, held_out=True), sampling, every=2)
    errors = measure(pipeline.unet, calls)
    print("| left out | noise-prediction error |\n| --- | --- |")
    for path, error in sorted(errors.items(), key=lambda item: item[1]):
        print(f"| {path} | {error:.1e} |")
    dead = sum(error < DEAD for error in errors.values())
    print(f"\n{dead} of {len(errors)} change the noise prediction by less than {DEAD:g}.")
    print(f"{args.captions} captions; {machine_name()}; torch {torch.__version__}")


if __name__ == "__main__":
    main()

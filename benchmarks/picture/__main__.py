"""`python -m benchmarks.picture --out docs/picture.png`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks import picture
from benchmarks.picture.draw import draw
from benchmarks.picture.measure import Amount, Measured, measure


def caption(measured: Measured) -> str:
    """What stands under the picture."""
    speeds = "; ".join(
        "-{:g} %: {median:.2f}x ({low:.2f} to {high:.2f})".format(slim.percent, **slim.speedup)
        for slim in measured.slim
    )
    errors = "; ".join(
        f"-{slim.percent:g} %: {slim.noise_error:.1e} (magnitude pruning {slim.pruned_error:.1e})"
        for slim in measured.slim
    )
    return (
        "The embedded model and slim ones of it: the same captions and noise, none of them in its training. "
        f"Speedups over dense with 95 % intervals, {measured.runtime}, one thread: {speeds}. "
        "Noise-prediction error, the relative mean squared change on the dense model's trajectory: "
        f"{errors}. Measured on {measured.machine}, by `python -m benchmarks.picture`."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.picture",
        description=picture.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = Amount()
    parser.add_argument("--out", type=Path, default=Path("docs/picture.png"), help="default: %(default)s")
    parser.add_argument("--budgets", default="12,25,50", help="percent of the UNet's parameters (default: %(default)s)")
    parser.add_argument("--captions", type=int, default=4, help="images of each model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=usual.steps, help="of every image (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=usual.samples, help="calibration prompts (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=usual.pairs, help="process pairs a speedup (default: %(default)s)")
    args = parser.parse_args(argv)
    amount = Amount(samples=args.samples, steps=args.steps, pairs=args.pairs)
    measured = measure([float(percent) for percent in args.budgets.split(",")], args.captions, amount)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(measured).quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(caption(measured))


if __name__ == "__main__":
    main()

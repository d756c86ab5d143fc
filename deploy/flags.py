"""Flags that several commands share; loads nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What the denoiser is watched doing, and how ranks are chosen: `CalibrationSettings` and `PlanSettings`."""
    parser.add_argument("--prompts", metavar="FILE", help="calibration prompts, one a line (default for demo: its own)")
    parser.add_argument("--samples", type=int, metavar="N", help="how many prompts to calibrate with (default: 64)")
    parser.add_argument(
        "--groups", metavar="LIST", help="of query_key,value_output,feed_forward,resnet (default: all but resnet)"
    )
    parser.add_argument("--align", type=int, metavar="N", help="ranks are multiples of this (default: 8)")
    parser.add_argument("--allocation", choices=("global", "uniform"), help="how ranks are chosen (default: global)")
    for name, kind, text in (
        ("steps", int, "scheduler steps per image (default: 20)"),
        ("guidance", float, "guidance scale (default: 5)"),
        ("batch", int, "prompts at a time (default: 8)"),
        ("seed", int, "of the first prompt's noise (default: 0)"),
        ("height", int, "pixels (default: the model's)"),
        ("width", int, "pixels (default: the model's)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def groups(text: str | None) -> tuple[str, ...] | None:
    """`query_key,value_output` as a tuple."""
    return tuple(part.strip() for part in text.split(",")) if text else None

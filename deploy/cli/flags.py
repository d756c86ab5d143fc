"""Flags that several commands share; loads nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """What the denoiser is watched doing, and how ranks are chosen: `CalibrationSettings` and `PlanSettings`."""
    add_sampling(parser)
    parser.add_argument(
        "--groups", metavar="LIST", help="of query_key,value_output,feed_forward,resnet (default: all but resnet)"
    )
    parser.add_argument("--align", type=int, metavar="N", help="ranks are multiples of this (default: 8)")
    parser.add_argument(
        "--allocation",
        choices=("global", "local", "uniform", "softmax"),
        help="how ranks are chosen: least error with measured sensitivities or without, or baselines (default: global)",
    )
    add_forms(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What the denoiser is watched doing."""
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="calibration prompts, one a line (default: 'general', the 500 built-in ones; for demo its own)",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="how many prompts to calibrate with (default: 64)")
    for name, kind, text in (
        ("steps", int, "scheduler steps per image (default: 20)"),
        ("guidance", float, "guidance scale (default: 5)"),
        ("batch", int, "prompts at a time (default: 8)"),
        ("seed", int, "of the first prompt's noise (default: 0)"),
        ("height", int, "pixels (default: the model's)"),
        ("width", int, "pixels (default: the model's)"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)


def add_forms(parser: argparse.ArgumentParser) -> None:
    """Which closed forms slim each group: `Forms`, whose defaults measured best."""
    forms = parser.add_argument_group("closed forms", "the defaults measured best; others are for comparison")
    forms.add_argument("--raw-keys", action="store_true", help="key moments about zero, not about each image's mean")
    forms.add_argument(
        "--value-moments", choices=("attended", "values"), help="whiten value_output after attention, or before"
    )
    forms.add_argument("--heads-apart", action="store_true", help="solve the output projection head by head")
    forms.add_argument(
        "--channels", choices=("elimination", "ridge_leverage"), help="how feed-forward channels are chosen"
    )
    forms.add_argument("--no-constant", action="store_true", help="carry no constant column into the biases")
    forms.add_argument(
        "--compensate",
        choices=("none", "projections", "sequential"),
        help="what is solved again on the slim model's own inputs: the projections behind slimmed blocks (default), "
        "also the last linears in blocks, one after the other, or nothing",
    )

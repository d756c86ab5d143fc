"""`slimdiff demo`: the whole chain on the embedded model."""

from __future__ import annotations

import argparse

EXAMPLE = """example:
  slimdiff demo --out demo-build        # then open demo-build/report.html"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo",
        help="the whole chain on the embedded model, on CPU, ending in a report",
        description="Slim, export, check, compare and time the embedded model on this CPU, and write a report. "
        "A second run does only what is not done yet.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--out", default="slimdiff-demo", metavar="DIR", help="build folder (default: %(default)s)")
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="do a stage and its dependants again"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.cli.commands.build import run_recipe
    from deploy.recipe.recipe import DEMO

    return run_recipe(DEMO, args)

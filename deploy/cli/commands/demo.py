"""`slimdiff demo`: the whole chain on the embedded model."""

from __future__ import annotations

import argparse

from deploy.cli import flags
from deploy.cli.commands.build import FORCE, run_recipe
from deploy.recipe.recipe import DEMO

DESCRIPTION = """Slim, export, check, compare and time the embedded model on this CPU, and write a report. A second
run does only what is not done yet."""
EXAMPLE = """example:
  slimdiff demo --out demo-build        # then open demo-build/report.html"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "--out", "DIR", "build folder (default: slimdiff-demo)", default="slimdiff-demo")
    flags.several(parser, "--force", "STAGE", FORCE)


def run(args: argparse.Namespace) -> int:
    return run_recipe(DEMO, args)

# PYTHON_ARGCOMPLETE_OK
"""The command `slimdiff`: results on stdout, everything else on stderr, and an exit code that can be relied on."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from slimdiff.errors import InputError, SlimdiffError

COMMANDS = {
    "demo": "the whole chain on the embedded model, on CPU, ending in a report",
    "build": "the whole chain from a recipe; finished stages with unchanged inputs are skipped",
    "calibrate": "collect a model's statistics into a file, for any number of budgets",
    "compress": "calibrate, plan, slim; writes a diffusers pipeline directory",
    "schedule": "which steps of an image are guided and which run the whole network: by hand, or measured and chosen",
    "lora": "a LoRA of a dense model converted onto its slim one, without training and without the dense model",
    "sweep": "the frontier: size and latency against fidelity, as JSON and as a page",
    "prompts": "a compact calibration set: few prompts that stand for all of a large file",
    "inspect": "what a slim model, ONNX file, engine, bundle, statistics, plan or build is",
    "export": "ONNX of every pipeline component, in optimum's directory layout",
    "engine": "a TensorRT or TensorRT-RTX engine with fixed shapes, from an ONNX folder",
    "validate": "parity of two artifacts of the same model on real trajectory inputs",
    "compare": "fidelity of slim against dense: noise-prediction error per timestep, image PSNR and SSIM, quality",
    "bench": "paired latency in fresh processes, with an interval and a verdict: pass, fail or inconclusive; its trend",
    "bundle": "what a machine needs to make images, with a manifest that is checked before it is used",
    "generate": "an image from an artifact: dense, slim, ONNX, engine, bundle",
    "doctor": "which runtimes, devices and versions are here, and what each missing one would need",
}
"""Command -> what it does, in the order of the help.

Each is a module of `deploy.cli.commands` with `DESCRIPTION`, `EXAMPLE`, `add_flags(parser)`, which says what it takes,
and `run(args)`, which does it and returns the exit code.
"""

CRASH = 70
EXIT_CODES = f"""exit codes:
  0    done, every gate passed
  1    a gate failed
  2    bad input or usage
  3    a runtime or package is missing
  4    the measurement is inconclusive
  {CRASH}   a crash: a fault of slimdiff's own
  130  interrupted"""


_NO_MEMORY = "there is not enough memory for this: use fewer or smaller images, or a machine with more"


class _Parser(argparse.ArgumentParser):
    """Its errors are one line, its flags are written out, and a command's own are added when that command is parsed."""

    def __init__(self, *, command: str = "", **more: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)
        self.command = command

    def fill(self) -> None:
        """Add what the command's module says, once."""
        if not self.command:
            return
        command = importlib.import_module(f"deploy.cli.commands.{self.command}")
        self.command = ""
        self.description, self.epilog = textwrap.fill(command.DESCRIPTION, 100), command.EXAMPLE
        command.add_flags(self)
        self.set_defaults(run=command.run)
        self.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        loud = self.add_mutually_exclusive_group()
        loud.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors on stderr")
        loud.add_argument("-v", "--verbose", action="store_true", help="details, and where an error came from")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the modules of those that are not parsed are not loaded, so `--help` is quick."""
    parser = _Parser(
        prog="slimdiff",
        description="Slim a diffusion model, export it, build its engine, prove what it computes and time it.",
        epilog=f"example:\n  slimdiff demo --out demo-build\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, command=name)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next, and argcomplete takes no flags later
            command.fill()
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("argcomplete").autocomplete(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `EXIT_CODES`."""
    args = argparse.Namespace(verbose=False, out=None)
    for stream in (sys.stdout, sys.stderr):  # names may have letters that the terminal lacks, or be no text at all
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = make_parser()
        parser.parse_args(argv, args)
        if args.version:
            print(f"slimdiff {_version()}")
            return 0
        if not hasattr(args, "run"):
            parser.print_help(sys.stderr)
            return 2
        return _run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", 130)
    except BrokenPipeError:  # the reader of stdout has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail(_NO_MEMORY, 2)
    except SlimdiffError as error:
        if args.verbose:
            traceback.print_exc()
        return _fail(str(error), error.exit_code)
    except Exception as error:
        from deploy.cli import disk_errors

        line = disk_errors.describe(error, args.out)
        if "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError":  # as torch says it
            line = _NO_MEMORY
        if line is not None:
            return _fail(line, 2)
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error} (a fault of ours: please report the lines above)", CRASH)


def _run(args: argparse.Namespace) -> int:
    if not args.verbose:  # before the libraries are imported; what the user has set stays
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from deploy.cli import console, outputs  # after the parsing: `--help` does without

    outputs.check_places(args)
    with console.on_stderr(quiet=args.quiet, verbose=args.verbose):
        code = args.run(args)
        sys.stdout.flush()  # a full disk shows here, while it can still be said
    return code


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("slimdiff")
    except metadata.PackageNotFoundError:  # run from its source
        return "(not installed)"


def _fail(message: str, code: int) -> int:
    print(f"slimdiff: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The command `slimdiff`: results on stdout, everything else on stderr, and an exit code that can be relied on."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = (
    "demo",
    "build",
    "calibrate",
    "compress",
    "sweep",
    "prompts",
    "inspect",
    "export",
    "engine",
    "validate",
    "compare",
    "bench",
    "bundle",
    "generate",
    "doctor",
)
"""The commands, in the order of the help; each is a module of `deploy.cli.commands` with `add_parser` and `run`."""

EXIT_CODES = """exit codes:
  0    done, every gate passed
  1    a gate failed
  2    bad input or usage
  3    a runtime or package is missing
  4    the measurement is inconclusive
  130  interrupted"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; loads neither torch nor diffusers, so that `--help` is quick."""
    parser = argparse.ArgumentParser(
        prog="slimdiff",
        description="Slim a diffusion model, export it, build its engine, prove what it computes and time it.",
        epilog=f"example:\n  slimdiff demo --out demo-build\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = importlib.import_module(f"deploy.cli.commands.{name}")
        added: argparse.ArgumentParser = command.add_parser(subparsers)
        added.formatter_class = argparse.RawDescriptionHelpFormatter
        added.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        added.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
        added.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see `EXIT_CODES`."""
    args = make_parser().parse_args(argv)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", 130)


def _run(args: argparse.Namespace) -> int:
    _calm(args.quiet)
    from deploy.cli import disk_errors
    from deploy.cli.console import start_logging  # after --help, for whatever imports slimdiff imports torch
    from slimdiff.errors import SlimdiffError

    start_logging(args.quiet)
    try:
        code = args.run(args)
        sys.stdout.flush()  # a full disk shows here, and not when nobody can tell of it any more
        return code
    except SlimdiffError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of stdout has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail("there is not enough memory for this: use fewer or smaller images, or a machine with more", 2)
    except Exception as error:
        line = disk_errors.told(error, getattr(args, "out", None))
        if line is None:
            raise
        return _fail(line, 2)


def _calm(quiet: bool) -> None:
    """Keep stderr readable; these must be set before the libraries are imported, and what the user has set stays."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        os.environ.setdefault("TQDM_DISABLE", "1")
    elif not sys.stderr.isatty():  # a line now and then in a log file, not ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "15")


def _fail(message: str, code: int) -> int:
    print(f"slimdiff: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

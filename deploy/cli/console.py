"""What people see: log lines with elapsed time on stderr, one result on stdout."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

from deploy.artifacts.build_folder import strict
from deploy.artifacts.numbers import amount as amount
from deploy.artifacts.numbers import relative as change  # noqa: F401
from deploy.artifacts.numbers import size as in_bytes  # noqa: F401

log = logging.getLogger("slimdiff")
"""Where every command tells what it is doing."""


class _Elapsed(logging.Formatter):
    """`[   12.3 s] message`, counted from the start of the command."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.time()

    def format(self, record: logging.LogRecord) -> str:
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"[{record.created - self.start:7.1f} s] {mark}{record.getMessage()}"


def start_logging(quiet: bool = False) -> None:
    """Send slimdiff's log to stderr, and keep the libraries below it calm.

    torch, diffusers and transformers warn about their own internals while they load; none of it is for the user of a
    command, and nothing of it may reach stdout.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Elapsed())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    warnings.filterwarnings("ignore")
    for name in (
        "torch",
        "torch.onnx",
        "diffusers",
        "transformers",
        "optimum",
        "onnxscript",
        "onnx_ir",
        "huggingface_hub",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def calm_libraries() -> None:
    """Import diffusers and transformers with their own chatter turned down; for commands that are about to use them."""
    with _noise_to_stderr():
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


class _noise_to_stderr:
    """stdout belongs to the result: what libraries print while they load goes to stderr."""

    def __enter__(self) -> None:
        self.stdout = sys.stdout
        sys.stdout = sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdout = self.stdout


def result(value: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result on stdout: one JSON object, or text for people."""
    print(json.dumps(strict(value), indent=2, allow_nan=False) if as_json else text)

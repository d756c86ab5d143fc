"""What people see: log lines with elapsed time and progress on stderr, one result on stdout."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from deploy.artifacts.build_folder import strict
from deploy.artifacts.numbers import amount, relative, size
from slimdiff.progress import progress_is_shown, show_progress, working

log = logging.getLogger("slimdiff")
"""Where every command says what it is doing."""

SECONDS_BETWEEN_BARS = 10.0
"""Between two lines of progress in a log file."""
_LIBRARIES = ("torch", "torch.onnx", "diffusers", "transformers", "optimum", "onnxscript", "onnx_ir", "huggingface_hub")


SHOWN: dict[str, Callable[[float], str]] = {
    "parameters": amount,
    "macs": amount,
    "bytes": size,
    "latency_ms": lambda ms: f"{ms:.2f} ms",
    "macs_per_image": amount,
    "latency_ms_per_image": lambda ms: f"{ms:.1f} ms",
    "int8_macs": lambda share: f"{100 * share:.1f} %",
}
"""Figures of a model, and how people read them."""
LABELS = {
    "macs": "MACs/sample",
    "latency_ms": "latency",
    "macs_per_image": "MACs/image",
    "latency_ms_per_image": "image",
    "int8_macs": "MACs in int8",
}
"""What they are called where that is not their key."""


class _Elapsed(logging.Formatter):
    """`[   12.3 s] message`, counted from the start of the command."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.time()

    def format(self, record: logging.LogRecord) -> str:
        mark = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return f"[{record.created - self.start:7.1f} s] {mark}{record.getMessage()}"


class _LogFile:
    """stderr that is no terminal: of a progress bar, which writes its line over and over, it takes a line at times.

    Of a bar inside a bar it does so where the outer one has had its chance.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.next = time.monotonic() + SECONDS_BETWEEN_BARS
        self.begun = False  # a line that is not a bar's
        self.inside = False  # on the line of a bar inside a bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        moves = not text.strip("\n") or not text.replace("\x1b[A", "")  # to the line of a bar inside a bar, or its end
        if not text.startswith("\r") and (self.begun or not moves):
            self.begun = not text.endswith("\n")
            return self.stream.write(text)
        if moves:
            self.inside = text.startswith("\n")
            return len(text)
        line, now = text.strip(), time.monotonic()
        if line and now >= self.next + SECONDS_BETWEEN_BARS * self.inside:
            self.next = now + SECONDS_BETWEEN_BARS
            self.stream.write(f"{line}\n")
        return len(text)


@contextlib.contextmanager
def on_stderr(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Send slimdiff's log and progress to stderr, and keep the libraries below it calm.

    torch, diffusers and transformers warn about their own internals while they load; none of it is for the user of a
    command, and nothing of it may reach stdout.
    """
    stream: Any = sys.stderr if sys.stderr.isatty() else _LogFile(sys.stderr)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Elapsed())
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    show_progress(not quiet)
    if not verbose:
        warnings.filterwarnings("ignore")
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(stream):
            yield
    finally:
        log.handlers[:], log.propagate = [], True


@working("load torch, diffusers and transformers")
def calm_libraries() -> None:
    """Import torch, diffusers and transformers, with their own chatter turned down, for commands that use them."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the result
        importlib.import_module("slimdiff.loading.pipelines")
        import diffusers.utils.logging as diffusers_logging
        import transformers.utils.logging as transformers_logging
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    (enable_progress_bars if progress_is_shown() else disable_progress_bars)()  # of downloads
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def result(args: argparse.Namespace, value: dict[str, Any], text: str, code: int = 0) -> int:
    """Print a command's result on stdout, as one JSON object or as text for people; `code` is the exit code."""
    print(json.dumps(strict(value), indent=2, allow_nan=False) if args.json else text)
    return code


def figures(of_both: dict[str, Any]) -> list[str]:
    """A line for each of the four figures: name -> `dense` and `slim`; those that were not measured have none."""
    lines = []
    for name, show in SHOWN.items():
        if figure := of_both.get(name):
            dense, slim = figure["dense"], figure["slim"]
            lines.append(f"{LABELS.get(name, name):12}{show(dense):>12} -> {show(slim):>12}   {relative(dense, slim)}")
    return lines

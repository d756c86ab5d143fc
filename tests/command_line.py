"""The command line as tests call it: in this process, real artifacts, what it says looked at."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import pytest

from deploy.cli.app import main, make_parser

_SAID = re.compile(r"^slimdiff: error: |^\[ *[0-9.]+ s\] warning: ")


def call(argv: list[Any], capsys, code: int = 0) -> dict[str, Any]:
    """What a command answers as JSON; asked to be quiet, it says nothing else but warnings and an error."""
    capsys.readouterr()
    ended = main([*(str(a) for a in argv), "--json", "--quiet"])
    seen = capsys.readouterr()
    assert ended == code, seen.err
    assert all(_SAID.search(line) for line in seen.err.splitlines()), seen.err
    return json.loads(seen.out)


def refused(argv: list[Any], capsys, code: int = 2) -> str:
    """The one line of a command's error; nothing may be on stdout."""
    assert main([str(a) for a in argv]) == code
    seen = capsys.readouterr()
    line = [text for text in seen.err.splitlines() if text.startswith("slimdiff: error: ")]
    assert seen.out == "" and len(line) == 1, seen.err
    return line[0]


def actions_of(command: str) -> list[argparse.Action]:
    """The arguments that a command takes."""
    parser = make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    with pytest.raises(SystemExit):
        parser.parse_args([command, "--help"])
    return subparsers.choices[command]._actions

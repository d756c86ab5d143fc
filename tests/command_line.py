"""The command line as tests call it: in this process, real artifacts, what it says looked at."""

from __future__ import annotations

import json
from typing import Any

from deploy.cli.app import main


def call(argv: list[Any], capsys, code: int = 0) -> dict[str, Any]:
    """What a command answers as JSON."""
    assert main([*(str(a) for a in argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(argv: list[Any], capsys, code: int = 2) -> str:
    """The one line of a command's error; nothing may be on stdout."""
    assert main([str(a) for a in argv]) == code
    seen = capsys.readouterr()
    line = [text for text in seen.err.splitlines() if text.startswith("slimdiff: error: ")]
    assert seen.out == "" and len(line) == 1, seen.err
    return line[0]

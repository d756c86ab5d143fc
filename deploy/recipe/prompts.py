"""Where prompts come from: a file, a list, the built-in general set, or the embedded model's own captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimdiff import prompts as built_in
from slimdiff.errors import InputError

EMBEDDED = "embedded"
GENERAL = "general"


def default_source(model: str) -> str:
    """What a model is calibrated with if nobody says: `demo` with its own captions, others with the general set."""
    return EMBEDDED if model == "demo" else GENERAL


def calibration_prompts(source: str | Sequence[str], count: int) -> list[str]:
    """Up to `count` prompts from `embedded`, `general`, a text file or a list.

    Raises:
        InputError: if there is none.
    """
    if source == EMBEDDED:
        from slimdiff import embedded

        return embedded.captions(count)
    return all_prompts(source)[:count]


def comparison_prompts(source: str | Sequence[str], used: int, count: int, seed: int) -> list[str]:
    """`count` prompts, as far as possible unseen by calibration: after the first `used`, then from the front.

    The embedded model's are held out of its training, too, and chosen by `seed`. Of the general set, calibration takes
    the front, so comparison takes the back, however many were used.
    """
    if source == EMBEDDED:
        from slimdiff import embedded

        return embedded.captions(count, seed, held_out=True)
    prompts = all_prompts(source)
    unseen = prompts[::-1] if source == GENERAL else prompts[used:] + prompts[:used]
    return [unseen[i % len(unseen)] for i in range(count)]


def described(source: str | Sequence[str]) -> str:
    """Where prompts come from, as a log line tells it."""
    if source == EMBEDDED:
        return "of the embedded model's world"
    if source == GENERAL:
        return "of the built-in general set"
    return f"from {Path(source).name}" if isinstance(source, str) else "from the recipe"


def all_prompts(source: str | Sequence[str]) -> list[str]:
    """Every prompt of `general`, of a text file of one prompt a line, or of a list.

    Raises:
        InputError: if there is none, one of a list is none, or the file cannot be read.
    """
    if source == GENERAL:
        return built_in.general()
    if isinstance(source, str):
        return built_in.read_file(Path(source))
    if not source:
        raise InputError("the list of prompts holds no prompt: write one prompt a line")
    return [str(prompt).strip() for prompt in built_in.check_inputs(source)]

"""Where prompts come from: a file, a list, or the embedded model's own captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slimdiff.errors import InputError

EMBEDDED = "embedded"


def calibration_prompts(source: str | Sequence[str], count: int) -> list[str]:
    """Up to `count` prompts from `embedded`, a text file or a list.

    Raises:
        InputError: if there is none.
    """
    if source == EMBEDDED:
        from slimdiff import embedded

        return embedded.captions(count)
    return _all_prompts(source)[:count]


def comparison_prompts(source: str | Sequence[str], used: int, count: int, seed: int) -> list[str]:
    """`count` prompts, as far as possible unseen by calibration: after the first `used`, then from the front.

    The embedded model's are held out of its training, too, and chosen by `seed`.
    """
    if source == EMBEDDED:
        from slimdiff import embedded

        return embedded.captions(count, seed, held_out=True)
    prompts = _all_prompts(source)
    unseen = prompts[used:] + prompts[:used]
    return [unseen[i % len(unseen)] for i in range(count)]


def _all_prompts(source: str | Sequence[str]) -> list[str]:
    if not isinstance(source, str):
        prompts = [p.strip() for p in source if p.strip()]
        where = "the list of prompts"
    else:
        where = source
        try:
            text = Path(source).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"{source}: no such prompt file; it must be a text file of one prompt a line") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read as a prompt file ({error}): write one prompt a line") from error
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{where} holds no prompt: write one prompt a line")
    return prompts

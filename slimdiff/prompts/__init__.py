"""A built-in calibration set for real checkpoints: 500 general prompts in our own wording, in `general.txt`."""

from __future__ import annotations

from pathlib import Path


def general(count: int | None = None) -> list[str]:
    """The first `count` general prompts, or all 500.

    People, animals, places, things, food, fantasy, abstraction, words in pictures, counts and relations, media, light;
    from 3 words to 60, in sentences and in comma-separated tags. Subjects alternate throughout the file, so that any
    number from the front is as mixed as the whole.
    """
    file = Path(__file__).parent / "general.txt"
    return file.read_text(encoding="utf-8").splitlines()[:count]

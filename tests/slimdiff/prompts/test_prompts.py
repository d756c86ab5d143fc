"""The built-in prompts are what they are said to be."""

from __future__ import annotations

import itertools
import re

from slimdiff import prompts


def words(prompt: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", prompt.lower()))


def test_there_are_500_and_no_two_are_alike():
    found = [words(p) for p in prompts.general()]
    assert len(found) == 500
    nearest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(found, 2))
    assert nearest < 0.5  # Jaccard: one for the same words


def test_each_is_one_clean_line_that_fits_a_text_encoder():
    for prompt in prompts.general():
        assert prompt == " ".join(prompt.split()) and prompt.isascii()
        assert 3 <= len(prompt.split()) <= 60
        # CLIP takes 77 tokens, two of them its own; long words may be two, and a mark is one.
        pieces = re.findall(r"\w+|[^\w\s]", prompt)
        assert len(pieces) + sum(len(piece) > 9 for piece in pieces) <= 75


def test_any_front_of_them_is_mixed():
    for count in (16, 64, 256):
        lengths = [len(p.split()) for p in prompts.general(count)]
        assert len(lengths) == count
        assert min(lengths) <= 7 and max(lengths) >= 35
        tags = [p for p in prompts.general(count) if p.count(",") >= 4]
        assert 0.03 * count <= len(tags) <= 0.4 * count

"""What prompts may be, and a built-in calibration set for real checkpoints: 500 general prompts, in `general.txt`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimdiff.errors import InputError

# One image's inputs: a prompt, or arguments of the pipeline's call by name.
Inputs = str | Mapping[str, Any]


def general(count: int | None = None) -> list[str]:
    """The first `count` general prompts, or all 500.

    People, animals, places, things, food, fantasy, abstraction, words in pictures, counts and relations, media, light;
    from 3 words to 60, in sentences and in comma-separated tags. Subjects alternate throughout the file, so that any
    number from the front is as mixed as the whole.
    """
    file = Path(__file__).parent / "general.txt"
    return file.read_text(encoding="utf-8").splitlines()[:count]


def check_inputs(prompts: Inputs | Iterable[Inputs], *, blank: bool = False, where: str = "prompts") -> list[Inputs]:
    """Prompts as a list, whatever they come in: a list, an array, a generator; a text or a mapping alone is one.

    Args:
        blank: whether a prompt may be empty, or hold nothing but spaces.
        where: what an error calls them.

    Raises:
        InputError: naming the first that is no text (or mapping of arguments), is empty, or cannot be written as UTF-8.
    """
    alone = isinstance(prompts, str | Mapping)
    if isinstance(prompts, str | Mapping):
        prompts = [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise InputError(f"{where} are a list of texts, not {type(prompts).__name__}")
    found: list[Inputs] = []
    for number, one in enumerate(prompts):
        place = where if alone else f"{where}[{number}]"
        if isinstance(one, Mapping):
            for name, value in one.items():
                if str(name).rstrip("_0123456789") in ("prompt", "negative_prompt") and value is not None:
                    _check_text(value, f"{place}[{name!r}]", blank=True)
            found.append(one)
        else:
            _check_text(one, place, blank)
            found.append(str(one))
    return found


def _check_text(value: object, place: str, blank: bool) -> None:
    if not isinstance(value, str):
        raise InputError(f"{place} is {type(value).__name__}, not a text: give a prompt such as 'a red barn'")
    if not blank and not value.strip():
        raise InputError(f"{place} is empty: leave it out, or say what to show")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place} holds bytes that are no UTF-8: {value!r}") from None


def read_file(file: Path) -> list[str]:
    """The prompts of a text file in UTF-8, one a line; blank lines aside.

    Lines end in a line feed, with or without a carriage return: any other separator belongs to its prompt.

    Raises:
        InputError: if the file is not there, cannot be read, is in another encoding, or holds no prompt.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file}: no such prompt file; it must be a text file of one prompt a line") from None
    except OSError as error:
        why = error.strerror or "it is no file"
        raise InputError(f"{file} cannot be read as a prompt file ({why}): write one prompt a line") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (at byte {error.start}): save it as UTF-8, one prompt a line") from error
    if "\0" in text:
        raise InputError(f"{file} is not UTF-8 text (it holds zero bytes): save it as UTF-8, one prompt a line")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{file} holds no prompt: write one prompt a line")
    return prompts

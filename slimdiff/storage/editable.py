"""Versioned JSON that people edit by hand: what is wrong with it is said in one line, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import to_json

from slimdiff.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class Editable(BaseModel):
    """A file's content, without fields that are not known."""

    model_config = ConfigDict(extra="forbid")

    noun: ClassVar[str]
    """What errors call it."""

    schema_version: Literal[1] = 1

    @field_validator("schema_version", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if type(value) is not int:
            raise ValueError("input should be 1")  # Python takes true and 1.0 for it
        return value

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read one, perhaps edited by hand.

        Raises:
            InputError: saying which entry is wrong and why.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: no {cls.noun} can be read there ({error})") from error
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, content: str | dict[str, Any], where: str) -> Self:
        """One from JSON text or a dictionary of the same; `where` is named in errors.

        Nothing is taken for something else: no text or truth for a number, no second key for the first.
        """
        try:
            if isinstance(content, str):
                content = json.loads(content, object_pairs_hook=_once, parse_constant=_no_number)
            return cls.model_validate_json(to_json(content), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{where}: {place + ': ' if place else ''}{reason}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; which of two equal keys counts, nobody would know."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")

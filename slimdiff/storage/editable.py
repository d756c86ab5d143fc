"""Versioned JSON that people edit by hand: what is wrong with it is said in one line, with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from slimdiff.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class Editable(BaseModel):
    """A file's content, without fields that are not known."""

    model_config = ConfigDict(extra="forbid")

    noun: ClassVar[str]
    """What errors call it."""

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
        """One from JSON text or a dictionary; `where` is named in errors."""
        try:
            return cls.model_validate(json.loads(content) if isinstance(content, str) else content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{where}: {place + ': ' if place else ''}{reason}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error

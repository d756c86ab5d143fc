"""Saying in one line what is wrong with a recipe: where, what, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in words, and how many more there are."""
    faults = error.errors(include_url=False)
    # An unknown key is the likelier cause of whatever else is wrong.
    line = _fault(min(faults, key=lambda fault: fault["type"] != "extra_forbidden"), model)
    return line if len(faults) == 1 else f"{line} ({len(faults) - 1} more)"


def _fault(fault: ErrorDetails, model: type[BaseModel]) -> str:
    *above, key = fault["loc"] or ("the recipe",)
    section = f"in {'.'.join(map(str, above))}: " if above else ""
    if fault["type"] == "extra_forbidden":
        return f"{section}unknown key {str(key)!r}{nearest(str(key), _keys_at(above, model))}"
    if fault["type"] == "missing":
        return f"{section}the key {str(key)!r} is missing"
    place, message = ".".join(map(str, [*above, key])), fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "refused":  # it says itself what was there
        return f"{place}: {message}"
    value = repr(fault["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{place}: {message[:1].lower()}{message[1:]}, got {value}"


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'? (known here: ...)`."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"{guess} (known here: {', '.join(known)})"


def _keys_at(loc: Iterable[int | str], model: type[BaseModel]) -> list[str]:
    """The keys, as they are written, of the settings at a place in the recipe."""
    for part in loc:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is not None:  # pydantic also names union members and indices: stay
            model = _model_in(field.annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _model_in(a))), None)

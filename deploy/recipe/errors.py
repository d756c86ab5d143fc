"""Saying in one line what is wrong with a recipe: where, what, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault in words, and how many more there are."""
    faults = error.errors(include_url=False)
    # An unknown key is the likelier cause of whatever else is wrong: tell it first.
    faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")
    line = _fault(faults[0]["loc"], faults[0]["type"], faults[0]["msg"], faults[0].get("input"), model)
    return line if len(faults) == 1 else f"{line} ({len(faults) - 1} more)"


def _fault(loc: tuple[int | str, ...], kind: str, message: str, value: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        owner = owner_of(loc[:-1], model)
        names = keys_of(owner) if owner else []
        return f"{_section(loc[:-1])}unknown key {str(loc[-1])!r}{nearest(str(loc[-1]), names)}"
    if kind == "missing":
        return f"{_section(loc[:-1])}the key {str(loc[-1])!r} is missing"
    if kind == "refused":  # it says itself what was there
        return f"{place}: {message}"
    fault = message.removeprefix("Value error, ")
    fault = fault[:1].lower() + fault[1:]
    return f"{place or 'the recipe'}: {fault}, got {_short(value)}"


def _section(loc: Iterable[int | str]) -> str:
    place = ".".join(str(part) for part in loc)
    return f"in {place}: " if place else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? (known: ...)`."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return f"{guess} (known here: {', '.join(names)})" if names else guess


def keys_of(model: type[BaseModel]) -> list[str]:
    """A model's keys as they are written."""
    return [field.alias or name for name, field in model.model_fields.items()]


def owner_of(loc: tuple[int | str, ...], model: type[BaseModel]) -> type[BaseModel] | None:
    """The settings class at a place in the recipe."""
    owner: type[BaseModel] | None = model
    for part in loc:
        if owner is None:
            return None
        field = next((f for name, f in owner.model_fields.items() if part in (name, f.alias)), None)
        owner = _model_in(field.annotation) if field else owner  # pydantic also names union members: stay
    return owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _model_in(a))), None)

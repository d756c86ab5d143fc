"""How much goes out of a denoiser: kinds of budgets, their texts and numbers. Needs no model, nor torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from slimdiff.errors import InputError
from slimdiff.settings import MOST


@dataclass(frozen=True)
class BudgetKind:
    """A unit of budgets: the half that needs no model; `slimdiff.planning.budgets.PlannedBy` is the other.

    Attributes:
        name: as `Budget` and plans have it.
        help: one line for its flag on the command line.
        read: the value in its plain form, text or a number; raises InputError if it is none.
        removed: how much of a total the value takes out; None if that shows only when models are measured.
        key: its name in recipes and its flag without dashes, if that is another.
    """

    name: str
    help: str
    read: Callable[[Any], str | float]
    removed: Callable[[Any, float], int | float] | None = None
    key: str = ""

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{(self.key or self.name).replace('_', '-')}"


_SCALES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def read_amount(value: Any, example: str = "100M") -> str:
    """A count such as the `example` or a share such as `12%`, as it was written."""
    text = str(value).strip()
    if not re.fullmatch(r"-?\s*[0-9]+(\.[0-9]+)?\s*[kMGBT%]?", text):
        raise InputError(f"budget {str(value)!r}: write a count such as {example} or a share such as 25%")
    number, share = float(text.strip("- kMGBT%")), text.endswith("%")
    if number == 0 or share and number >= 100:
        right = f"a count such as {example}, or a share such as 25%, above 0% and below 100%"
        raise InputError(f"budget {str(value)!r} must lie between nothing and all: write {right}")
    if not share and text[-1].isdigit() and number >= 1 and not number.is_integer():
        raise InputError(f"budget {str(value)!r} is no whole count: for a share of all write {number:g}%")
    if not share and text[-1].isdigit() and number < 1:
        raise InputError(f"budget {str(value)!r} is less than one: for that share of all write {100 * number:g}%")
    return str(value)


def removed_amount(value: str, total: float, noun: str) -> int:
    """How many of `total` an amount is; an InputError if none of them, or all."""
    text = value.strip().removeprefix("-")
    number = float(text.rstrip("kMGBT% "))
    removed = round(number * (total / 100 if text.endswith("%") else _SCALES[text.lstrip("0123456789. ")]))
    if not 0 < removed < total:
        right = f"a count between, or a share such as {'25%' if removed else f'{200 / total:.2g}%'}"
        raise InputError(f"budget {value!r} is {removed:,} of {total:,.0f} {noun}: write {right}")
    return removed


def read_number(value: Any, least: float, most: float, what: str) -> float:
    """A number above `least`, and at most `most`; an error says `what` it must be."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{what}, not {value!r}") from None
    if isinstance(value, bool) or not least < number <= most:  # Python takes True for 1
        raise InputError(f"{what}, not {value}: it must be finite, greater than {least} and at most {most}")
    return number


BUDGETS: dict[str, BudgetKind] = {
    kind.name: kind
    for kind in (
        BudgetKind(
            "parameters",
            "how much to take out of the denoiser: a count of parameters (100M) or a share of all of them (12%)",
            read_amount,
            partial(removed_amount, noun="parameters"),
            key="reduce",
        ),
        BudgetKind(
            "macs",
            "how many multiply-accumulates per sample (by a schedule, per image) to take out: a count or a share (20%)",
            partial(read_amount, example="50G"),
            partial(removed_amount, noun="MACs"),
        ),
        BudgetKind(
            "speedup",
            "dense latency over slim latency, such as 1.35, by a measured table of latencies",
            partial(read_number, least=1, most=1000, what="a speedup is dense latency over slim latency, such as 1.35"),
            lambda value, total: total * (1 - 1 / value),
        ),
        BudgetKind(
            "max_error",
            "the smallest model whose noise prediction changes by at most this (relative mean squared), measured",
            partial(read_number, least=0, most=MOST, what="max_error is a relative squared error, such as 1e-4"),
        ),
    )
}
"""The kinds that there are, by name; `slimdiff.planning.planner.register_budget` adds one."""


class Budget:
    """How much goes out of the denoiser: a value of exactly one kind of `BUDGETS`.

    `parameters` and `macs` are counts (`100M`, `2.5G`, `30k`, `1500000`) or shares of *all* the denoiser's parameters
    or multiply-accumulates (`12%`); a leading minus is allowed, for it says how much to remove. MACs are those of one
    sample, and a guided call has two an image. `speedup` is the dense model's latency over the slim one's, by a
    measured table of latencies. Both are of a whole image where there is a schedule, by which dense and slim make it.
    `max_error` bounds the relative mean squared change of the noise prediction: the smallest model below it is sought.

    Attributes:
        kind: the name of its kind.
        value: text or a number, as `BudgetKind.read` gives it.

    Raises:
        InputError: unless exactly one is given, or if its value is none of its kind.
    """

    def __init__(self, parameters: str | int | None = None, **others: Any) -> None:
        values = {"parameters": parameters, **others}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1 or given[0] not in BUDGETS:
            seen = " and ".join(given) or "none"
            raise InputError(f"a budget is exactly one of {', '.join(BUDGETS)}; given: {seen}")
        self.kind = given[0]
        self.value = BUDGETS[self.kind].read(values[self.kind])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and str(self) == str(other)

    def __str__(self) -> str:
        return f"{self.kind} {self.value}"

    __repr__ = __str__

    def removed(self, total: float) -> int | float:
        """How much of `total` must go, in the unit of the kind: parameters, MACs, milliseconds.

        Raises:
            InputError: if that is nothing or everything, or shows only when models are measured.
        """
        removed = BUDGETS[self.kind].removed
        if removed is None:
            raise InputError(f"{self.kind} bounds the error: what it removes shows only when models are measured")
        return removed(self.value, total)

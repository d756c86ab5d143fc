"""The budget: what a plan may cost, in one of four units."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, model_validator

from slimdiff.errors import InputError

BudgetKind = Literal["parameters", "macs", "speedup", "max_error"]
KINDS: tuple[BudgetKind, ...] = ("parameters", "macs", "speedup", "max_error")
_NOUN = {"parameters": "parameters", "macs": "MACs"}


class Budget(BaseModel):
    """How much goes out of the denoiser: exactly one of four.

    `parameters` and `macs` are counts (`100M`, `2.5G`, `30k`, `1500000`) or shares of *all* the denoiser's parameters
    or multiply-accumulates (`12%`); a leading minus is allowed, for what is said is what goes. MACs are those of one
    call at batch 1. `speedup` is the dense model's latency over the slim one's, by a measured table of latencies.
    `max_error` bounds the relative mean squared change of the noise prediction: the smallest model below it is sought.

    Raises:
        InputError: unless exactly one is given, or for a speedup not above 1, or an error not above 0.
    """

    model_config = ConfigDict(extra="forbid")

    parameters: str | None = None
    macs: str | None = None
    speedup: float | None = None
    max_error: float | None = None

    def __init__(self, parameters: str | int | None = None, *, macs: str | int | None = None, **data: Any) -> None:
        def text(value: str | int | None) -> str | None:
            return None if value is None else str(value)

        super().__init__(parameters=text(parameters), macs=text(macs), **data)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            seen = " and ".join(given) or "none"
            raise InputError(f"a budget is exactly one of {', '.join(KINDS)}; given: {seen}")
        if self.speedup is not None and not (1 < self.speedup < math.inf):
            raise InputError(f"a speedup is dense latency over slim latency, such as 1.35, not {self.speedup:g}")
        if self.max_error is not None and not (0 < self.max_error < math.inf):
            raise InputError(f"max_error is a relative squared error above 0, such as 1e-4, not {self.max_error:g}")
        return self

    @property
    def kind(self) -> BudgetKind:
        """Which of the four it is."""
        return cast(BudgetKind, next(name for name in KINDS if getattr(self, name) is not None))

    def __str__(self) -> str:
        return f"{self.kind} {getattr(self, self.kind)}"

    def removed(self, total: float) -> int | float:
        """How much of `total` must go: parameters or MACs (whole numbers), or milliseconds for a speedup.

        Raises:
            InputError: if the text is no amount, or asks for nothing, or for everything, or the budget is `max_error`.
        """
        if self.speedup is not None:
            return total * (1 - 1 / self.speedup)
        text = self.parameters if self.parameters is not None else self.macs
        if text is None:
            raise InputError("max_error bounds the error: what it removes shows only when models are measured")
        match = re.fullmatch(r"-?\s*(\d+(?:\.\d+)?)\s*([kMGBT%]?)", text.strip())
        if not match:
            raise InputError(f"budget {text!r}: write a count such as 100M or a share such as 25%")
        number, unit = float(match[1]), match[2]
        scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "%": total / 100}[unit]
        removed = round(number * scale)
        if not 0 < removed < total:
            noun = _NOUN[self.kind]
            raise InputError(f"budget {text!r} is {removed:,} of {total:,.0f} {noun}: it must lie between")
        return removed

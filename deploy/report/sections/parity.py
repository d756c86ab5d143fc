"""Parity: the checks of each comparison of two runs of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHORT_TABLE = 8  # rows: longer tables are folded away under their worst rows


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`parity`: the comparisons; `worst` of a long one are the checks of each metric closest to their bound."""
    parts = results["validate"]["parts"]
    return {"parity": [{**part, "worst": _worst_of_each_metric(part["checks"])} for part in parts]}


def _worst_of_each_metric(checks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(checks) <= _SHORT_TABLE:
        return []
    metrics = dict.fromkeys(check["metric"] for check in checks)
    return [_worst([check for check in checks if check["metric"] == metric]) for metric in metrics]


def _worst(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one metric's checks, one that failed before one that holds, then the one nearest to its bound."""

    def distance(check: Mapping[str, Any]) -> tuple[bool, float]:
        value, bound = check["value"], check["bound"]
        if not isinstance(value, int | float) or not isinstance(bound, int | float):
            return bool(check["passed"]), -1.0
        return bool(check["passed"]), abs(value - bound) * (1 if check["passed"] else -1)

    return min(checks, key=distance)

"""Parity: the checks of each comparison of two runs of the same model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SHORT_TABLE = 8  # rows: longer tables are folded away under their worst rows


def build(results: Mapping[str, Any], _folder: Path) -> dict[str, Any]:
    """`parity`: the comparisons; `worst` of a long one are the checks of each metric closest to their bound."""
    validate = results["validate"]
    if "skipped" in validate:
        return {"parity": []}
    parts = validate.get("parts") or [{"name": "Slim in its runtime against slim in torch", **validate}]
    return {"parity": [_comparison(part, list(part["checks"])) for part in parts]}


def _comparison(part: Mapping[str, Any], checks: list[dict[str, Any]]) -> dict[str, Any]:
    by_metric: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for check in checks:
        by_metric[check["metric"]].append(check)
    return {
        "name": str(part["name"]),
        "precision": str(part.get("precision") or ""),
        "passed": bool(part["passed"]),
        "first_diverging": part.get("first_diverging"),
        "checks": checks,
        "worst": [_worst(c) for c in by_metric.values()] if len(checks) > _SHORT_TABLE else [],
    }


def _worst(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one metric's checks, one that failed before one that holds, then the one nearest to its bound."""

    def distance(check: Mapping[str, Any]) -> tuple[bool, float]:
        value, bound = check["value"], check["bound"]
        if not isinstance(value, int | float) or not isinstance(bound, int | float):
            return bool(check["passed"]), -1.0
        return bool(check["passed"]), abs(value - bound) * (1 if check["passed"] else -1)

    return min(checks, key=distance)

"""Ranks, errors and sensitivities per site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.artifacts import numbers
from deploy.report.plots import log_scale, place
from slimdiff.settings import TRANSFORMER_GROUPS


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`sites`: a table for each module that sites sit in, and the totals of each group."""
    planned = results["plan"]["sites"]
    # Sites of groups that the recipe leaves out are dense, and there is nothing else to say of them.
    sites = {name: s for name, s in planned.items() if s["rank"] < s["dense_rank"] or s.get("local_error") is not None}
    predicted = any(s.get("predicted_error") is not None for s in sites.values())
    key = "predicted_error" if predicted else "local_error"
    errors = log_scale(s.get(key) for s in sites.values())
    sensitivities = log_scale(s.get("sensitivity") for s in sites.values())
    blocks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, site in sites.items():
        block, dot, _ = site["path"].rpartition(".")
        heads = f" per head, {site['heads']} heads" if site["heads"] > 1 else ""
        error, sensitivity = site.get(key), site.get("sensitivity")
        blocks[block or "denoiser"].append(
            {
                "prefix": block + dot,
                "leaf": name.removeprefix(block + dot),
                "group": site["group"],
                "rank": f"{site['rank']}/{site['dense_rank']}",
                "title": f"{name}: rank {site['rank']} of {site['dense_rank']}{heads}",
                "share": round(100 * site["rank"] / site["dense_rank"], 2),
                "error": _digits(error),
                "error_at": place(errors, error),
                "sensitivity": _digits(sensitivity),
                "sensitivity_at": place(sensitivities, sensitivity),
            }
        )
    shown = {
        "blocks": blocks,
        "totals": _totals(list(sites.values()), predicted),
        "error_name": "predicted error" if predicted else "local error",
        "error_scale": errors,
        "sensitivity_scale": sensitivities,
        "shown": len(sites),
        "unasked": len(planned) - len(sites),
    }
    return {"sites": shown}


def _totals(sites: Sequence[Mapping[str, Any]], predicted: bool) -> list[dict[str, Any]]:
    totals, present = [], dict.fromkeys(s["group"] for s in sites)
    for group in sorted(present, key=lambda group: (*TRANSFORMER_GROUPS, group).index(group)):
        members = [s for s in sites if s["group"] == group]
        kept = sum(s["rank"] for s in members) / sum(s["dense_rank"] for s in members)
        known = [s["predicted_error"] for s in members if predicted and s.get("predicted_error") is not None]
        error = _digits(sum(known) if known else None)
        totals.append({"group": group, "sites": len(members), "share": numbers.percent(kept), "error": error})
    return totals


def _digits(value: float | None) -> str:
    return numbers.NONE if value is None else numbers.digits(value, 2)

"""Ranks, errors and sensitivities per site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

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
        blocks[block or "denoiser"].append(
            {
                **site,
                "prefix": block + dot,
                "leaf": name.removeprefix(block + dot),
                "error": site.get(key),
                "error_at": place(errors, site.get(key)),
                "sensitivity_at": place(sensitivities, site.get("sensitivity")),
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
        totals.append({"group": group, "sites": len(members), "share": kept, "error": sum(known) if known else None})
    return totals

"""The engine: facts, dimensions checked against the plan, attention modules as parsed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.artifacts import numbers


def build(results: Mapping[str, Any], _folder: Path) -> dict[str, Any]:
    """`engine_facts` by name, `mismatches` with the plan and `attention` modules; nothing without an engine."""
    engine = results["engine"]
    if "skipped" in engine:
        return {}
    attention, rows, fused = engine.get("attention") or [], engine.get("sites") or [], engine.get("fused_attention")
    wrong = [row for row in rows if not row["ok"]]
    kernels = (
        f"{fused['calls']} of {len(attention)} attention modules, {fused['kernels']} distinct kernels" if fused else ""
    )
    checked = f"{len(rows) - len(wrong)} of {len(rows)} checks against the plan hold"
    facts = {
        "Backend": f"{engine['backend']} {engine.get('version', '')}",
        "Targets": ", ".join(engine.get("targets") or []) or "the GPU of this machine",
        "Precision": engine.get("precision", ""),
        "Size": numbers.in_bytes(engine["bytes"]),
        "Build time": numbers.duration(engine["seconds"]),
        "Layers": engine.get("layers", ""),
        "Fused attention": kernels,
        "Inner dimensions": checked if rows else "not checked against a plan",
    }
    return {"engine_facts": facts, "mismatches": wrong, "attention": attention}

"""The gates of the recipe, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.artifacts import numbers


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """`gates`: those of `build.json` with their value and bound in words."""
    return {"gates": [{**g, "shown": gate_value(g), "asked": gate_bound(g)} for g in results["build"]["gates"]]}


def gate_of(results: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """One of the gates by its name; empty if the recipe does not have it."""
    return next((gate for gate in results["build"]["gates"] if gate["gate"] == name), {})


def gate_value(gate: Mapping[str, Any]) -> str:
    """The value that a gate bounds, with its unit."""
    value = gate["value"]
    if value is None:
        return "identical" if gate["gate"] == "psnr_db" and gate["verdict"] == "pass" else "not measured"
    if isinstance(value, bool):
        return "holds" if value else "does not hold"
    if gate["unit"] == "x":
        return f"{value:.3g}\u00d7" if value < 1 else f"{value:.2f}\u00d7"
    if gate["unit"] in ("points", "dB"):
        return f"{numbers.signless(value, 2)}{numbers.NBSP}{gate['unit']}"
    return numbers.digits(value)


def gate_bound(gate: Mapping[str, Any]) -> str:
    """The bound of a gate: `≥ 1.05×`."""
    sign = {"lower": "\u2264", "higher": "\u2265"}.get(gate["better"], "")
    unit = {"x": "\u00d7", "": ""}.get(gate["unit"], f"{numbers.NBSP}{gate['unit']}")
    return f"{sign}{numbers.NBSP}{gate['bound']:g}{unit}"

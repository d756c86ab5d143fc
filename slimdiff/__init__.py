"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimdiff.calibration.calibrate import calibrate
    from slimdiff.compression import Compression, compress
    from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
    from slimdiff.plan import Plan
    from slimdiff.planning.planner import make_plan
    from slimdiff.settings import Budget, CalibrationSettings, PlanSettings, Sampling
    from slimdiff.slimming.slim import slim_denoiser
    from slimdiff.statistics import Statistics

__all__ = [
    "Budget",
    "CalibrationSettings",
    "Compression",
    "InputError",
    "MissingPackageError",
    "Plan",
    "PlanSettings",
    "Sampling",
    "SlimdiffError",
    "Statistics",
    "calibrate",
    "compress",
    "make_plan",
    "slim_denoiser",
]

_HOMES = {
    "Budget": "settings",
    "CalibrationSettings": "settings",
    "calibrate": "calibration.calibrate",
    "Compression": "compression",
    "compress": "compression",
    "InputError": "errors",
    "MissingPackageError": "errors",
    "SlimdiffError": "errors",
    "Plan": "plan",
    "PlanSettings": "settings",
    "make_plan": "planning.planner",
    "slim_denoiser": "slimming.slim",
    "Statistics": "statistics",
    "Sampling": "settings",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562): torch and diffusers take seconds, and `slimdiff.errors` needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"slimdiff.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimdiff.budget import Budget
    from slimdiff.calibration import CalibrationSettings, calibrate
    from slimdiff.compression import Compression, compress
    from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
    from slimdiff.plan import Plan
    from slimdiff.planning import PlanSettings, make_plan
    from slimdiff.slimming import slim_denoiser
    from slimdiff.statistics import Statistics
    from slimdiff.trajectory import Sampling

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
    "Budget": "budget",
    "CalibrationSettings": "calibration",
    "calibrate": "calibration",
    "Compression": "compression",
    "compress": "compression",
    "InputError": "errors",
    "MissingPackageError": "errors",
    "SlimdiffError": "errors",
    "Plan": "plan",
    "PlanSettings": "planning",
    "make_plan": "planning",
    "slim_denoiser": "slimming",
    "Statistics": "statistics",
    "Sampling": "trajectory",
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

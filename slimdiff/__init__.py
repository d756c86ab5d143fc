"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimdiff.calibration.calibrate import calibrate
    from slimdiff.compression import Compression, Compressor, compress
    from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
    from slimdiff.fidelity import compare
    from slimdiff.loading.pipelines import load_pipeline
    from slimdiff.plan import Plan
    from slimdiff.planning.planner import make_plan
    from slimdiff.progress import show_progress
    from slimdiff.settings import PAPERS, Budget, CalibrationSettings, Forms, PlanSettings, Sampling
    from slimdiff.slimming.slim import slim_denoiser
    from slimdiff.statistics import Statistics

__all__ = [
    "Budget",
    "CalibrationSettings",
    "Compression",
    "Compressor",
    "Forms",
    "InputError",
    "MissingPackageError",
    "PAPERS",
    "Plan",
    "PlanSettings",
    "Sampling",
    "SlimdiffError",
    "Statistics",
    "calibrate",
    "compare",
    "compress",
    "load_pipeline",
    "make_plan",
    "show_progress",
    "slim_denoiser",
]

_HOMES = {
    **dict.fromkeys(("PAPERS", "Budget", "CalibrationSettings", "Forms", "PlanSettings", "Sampling"), "settings"),
    **dict.fromkeys(("Compression", "Compressor", "compress"), "compression"),
    **dict.fromkeys(("InputError", "MissingPackageError", "SlimdiffError"), "errors"),
    "Plan": "plan",
    "Statistics": "statistics",
    "calibrate": "calibration.calibrate",
    "compare": "fidelity",
    "load_pipeline": "loading.pipelines",
    "make_plan": "planning.planner",
    "show_progress": "progress",
    "slim_denoiser": "slimming.slim",
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

"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

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

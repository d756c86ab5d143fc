"""Slim diffusion models in closed form, guided by their activations, without a gradient step."""

from .budget import Budget
from .calibration.calibrate import calibrate
from .compression import Compression, Compressor, compress
from .conversion import ConvertedLora, convert_lora
from .denoising.scheduled import schedule_pipeline
from .errors import InputError, MissingPackageError, SlimdiffError
from .fidelity import compare
from .loading.pipelines import load_pipeline
from .plan import Plan
from .planning.planner import make_plan
from .progress import show_progress
from .schedule import Schedule, make_schedule
from .settings import PAPERS, CalibrationSettings, Forms, PlanSettings, Sampling
from .slimming.map_file import save_maps
from .slimming.slim import slim_denoiser
from .statistics import Statistics

__all__ = [
    "Budget",
    "CalibrationSettings",
    "Compression",
    "Compressor",
    "ConvertedLora",
    "Forms",
    "InputError",
    "MissingPackageError",
    "PAPERS",
    "Plan",
    "PlanSettings",
    "Sampling",
    "Schedule",
    "SlimdiffError",
    "Statistics",
    "calibrate",
    "compare",
    "compress",
    "convert_lora",
    "load_pipeline",
    "make_plan",
    "make_schedule",
    "save_maps",
    "schedule_pipeline",
    "show_progress",
    "slim_denoiser",
]

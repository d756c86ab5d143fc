"""The build: stages from a recipe to a verdict, and a sweep alone; with what single commands share with its stages."""

from deploy.build.chain import run_build, run_sweep
from deploy.build.steps.compare import quality
from deploy.build.steps.export import shapes
from deploy.build.verdict import EXIT_CODE, judge, overall
from deploy.build.workshop import spread

__all__ = ["EXIT_CODE", "judge", "overall", "quality", "run_build", "run_sweep", "shapes", "spread"]

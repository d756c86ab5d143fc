from .build.chain import run_build
from .bundle.load import load

__all__ = ["load", "run_build"]

"""TensorRT and TensorRT-RTX engines: building, reusing, checking; the building itself is in a process of its own.

`build_engine` makes one or takes the one that is there, `pipeline.py` finds those of a whole pipeline, `check_engine`
says before an engine is opened whether it can run here. Nothing in this package imports TensorRT.
"""

from exporters.engine.backends import EXTRAS, MODULES, available_backend
from exporters.engine.build import EngineRequest, build_engine, request_engine
from exporters.engine.check import check_engine, choose_profile
from exporters.engine.gpu import Gpu, gpu_here, has_gpu
from exporters.settings import EngineSettings, ShapeRange

__all__ = [
    "EXTRAS",
    "MODULES",
    "EngineRequest",
    "EngineSettings",
    "Gpu",
    "ShapeRange",
    "available_backend",
    "build_engine",
    "check_engine",
    "choose_profile",
    "gpu_here",
    "has_gpu",
    "request_engine",
]

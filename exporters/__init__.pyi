"""ONNX graphs, ONNX Runtime, TensorRT(-RTX) engines, parity and latency of slim and dense diffusion models."""

from .engine.build import build_engine
from .graphs.export import export_unet
from .graphs.pipeline import export_pipeline
from .latency.decision import Gate
from .latency.measure import bench
from .registry import Runtime, register
from .runtimes.pipeline import load_pipeline
from .settings import BenchSettings, EngineSettings, ExportSettings, ShapeRange, TableSettings
from .validation.graph import check_parity

__all__ = [
    "BenchSettings",
    "EngineSettings",
    "ExportSettings",
    "Gate",
    "Runtime",
    "ShapeRange",
    "TableSettings",
    "bench",
    "build_engine",
    "check_parity",
    "export_pipeline",
    "export_unet",
    "load_pipeline",
    "register",
]

"""ONNX graphs, ONNX Runtime, TensorRT(-RTX) engines, parity and latency of slim and dense diffusion models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.engine.build import build_engine
    from exporters.graphs.export import export_unet
    from exporters.graphs.pipeline import export_pipeline
    from exporters.latency.decision import Gate
    from exporters.latency.measure import bench
    from exporters.registry import Runtime, register
    from exporters.runtimes.pipeline import load_pipeline
    from exporters.settings import BenchSettings, EngineSettings, ExportSettings, ShapeRange, TableSettings
    from exporters.validation.graph import check_parity

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

_HOMES = {
    **dict.fromkeys(("BenchSettings", "EngineSettings", "ExportSettings", "ShapeRange", "TableSettings"), "settings"),
    **dict.fromkeys(("Runtime", "register"), "registry"),
    "Gate": "latency.decision",
    "bench": "latency.measure",
    "build_engine": "engine.build",
    "check_parity": "validation.graph",
    "export_pipeline": "graphs.pipeline",
    "export_unet": "graphs.export",
    "load_pipeline": "runtimes.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562): torch and diffusers take seconds, and a timed process needs neither."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"exporters.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

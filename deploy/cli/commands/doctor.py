"""`slimdiff doctor`: what is installed here, and what the rest would need."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

from exporters.registry import installable

DESCRIPTION = """Say which runtimes, devices and versions are here, what each missing one would need, and which folder
each package is imported from."""
EXAMPLE = """example:
  slimdiff doctor"""

TOOLS = (
    ("onnx export", "onnxscript", ("onnxscript",), "pip install 'slimdiff[onnx]'"),
    ("parity (polygraphy)", "polygraphy", ("polygraphy",), "pip install 'slimdiff[onnx]'"),
    ("optimum", "optimum.onnxruntime", ("optimum-onnx",), "pip install 'slimdiff[optimum]'"),
)
"""Name, module, the distributions that bring it, and what it needs where it is missing; of what is no runtime."""

PACKAGES = (
    *("slimdiff", "exporters", "deploy"),
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy", "pydantic"),
    *("onnx", "onnxscript", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "openvino"),
)
"""Packages whose folder is named: one of the same name in the working directory may come before the one meant."""

_TYPES = ("FP32", "FP16", "BF16", "INT8")


def add_flags(parser: argparse.ArgumentParser) -> None:
    del parser  # none but those of every command


def run(args: argparse.Namespace) -> int:
    from deploy.cli.console import calm_libraries, log, result

    log.info("doctor: looking at what is installed")
    calm_libraries()
    from deploy.artifacts.figures import machine
    from slimdiff.storage import manifest

    here = machine()
    value = {
        "python": platform.python_version(),
        "versions": manifest.versions(),
        "imported_from": {name: folder for name in PACKAGES if (folder := _folder(name)) is not None},
        "machine": here,
        "devices": ["cpu", *here["gpus"]],
        "runtimes": [_runtime(*entry) for entry in (*installable(), *TOOLS)],
    }
    return result(args, value, _text(value))


def _folder(package: str) -> str | None:
    """Where a package is imported from; None if it is not here."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module in sys.modules that has none
        return None
    if spec is None:
        return None
    return str(Path(spec.origin).parent) if spec.origin else next(iter(spec.submodule_search_locations or []), None)


def _runtime(name: str, module: str, distributions: tuple[str, ...], needs: str) -> dict[str, Any]:
    here = _found(module)
    runtime: dict[str, Any] = {"name": name, "installed": here, "version": _version(distributions) if here else None}
    if not here:
        return {**runtime, "needs": needs}
    if module == "onnxruntime":
        import onnxruntime

        runtime["providers"] = onnxruntime.get_available_providers()
    if module == "openvino":
        import openvino

        core = openvino.Core()
        runtime["devices"] = core.available_devices
        if "CPU" in runtime["devices"]:
            runtime["cpu_precisions"] = [
                p for p in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") if p in _TYPES
            ]
            runtime["cpu_default"] = core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    if module in ("tensorrt", "tensorrt_rtx"):
        from exporters.engine.gpu import gpu_here

        runtime["runs_engines_here"] = gpu_here() is not None
        if not runtime["runs_engines_here"]:
            runtime["needs"] = "an NVIDIA GPU with its driver, to run engines" + (
                " and to build them" if module == "tensorrt" else "; they can be built here for named targets"
            )
    return runtime


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package that is not there
        return False


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _text(value: dict[str, Any]) -> str:
    machine = value["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"{machine['system']}, {machine['processor']}, {machine['cpus']} cores, {machine['memory_gib']} GiB, {gpus}",
        f"Python {value['python']}, " + ", ".join(f"{name} {version}" for name, version in value["versions"].items()),
        "",
    ]
    for runtime in value["runtimes"]:
        state = f"{runtime['version'] or 'version unknown'}" if runtime["installed"] else "missing"
        details = [*runtime.get("providers", []), *runtime.get("devices", [])]
        if "cpu_default" in runtime:
            details.append(f"computes in {runtime['cpu_default']} by default")
        extra = f" ({', '.join(details)})" if details else ""
        needs = f"; needs {runtime['needs']}" if runtime["installed"] and "needs" in runtime else ""
        remedy = f": {runtime['needs']}" if not runtime["installed"] else ""
        lines.append(f"{runtime['name']:20} {state}{extra}{needs}{remedy}")
    lines += ["", "imported from", *(f"{name:20} {folder}" for name, folder in value["imported_from"].items())]
    return "\n".join(lines)

"""`slimdiff doctor`: what is installed here, and what the rest would need."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from pathlib import Path
from typing import Any

from deploy.cli.console import calm_libraries, log, result
from exporters.machine import exact_int8
from exporters.registry import installable
from slimdiff.progress import AFTER, bar
from slimdiff.storage import manifest

DESCRIPTION = """Say which runtimes, devices and versions are here, what each missing one would need, and which folder
each package is imported from."""
EXAMPLE = """example:
  slimdiff doctor"""

TOOLS = (
    ("onnx export", "onnxscript", ("onnxscript",), "pip install 'slimdiff[onnx]'"),
    ("int8 export", "nncf", ("nncf",), "pip install 'slimdiff[int8]'"),
    ("parity (polygraphy)", "polygraphy", ("polygraphy",), "pip install 'slimdiff[onnx]'"),
    ("optimum", "optimum.onnxruntime", ("optimum-onnx",), "pip install 'slimdiff[optimum]'"),
    ("metrics of images", "torchmetrics", ("torchmetrics",), "pip install 'slimdiff[metrics]'"),
)
"""Name, module, the distributions that bring it, and what it needs where it is missing; of what is no runtime."""

PACKAGES = (
    *("slimdiff", "exporters", "deploy"),
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "scipy", "pydantic"),
    *("onnx", "onnxscript", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "openvino"),
)
"""Packages whose folder is named: one of the same name in the working directory may come before the one meant."""

_TYPES = ("FP32", "FP16", "BF16", "INT8")
_INT8 = {
    True: "exact",
    False: "clipped: no VNNI; graphs whose int8 weights take more than 7 bits are refused where they come out wrong",
    None: "unknown: the system does not say whether the processor has VNNI, and is taken for one without",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    del parser  # none but those of every command


def run(args: argparse.Namespace) -> int:
    log.info("doctor: looking at what is installed")
    calm_libraries()
    from deploy.artifacts.figures import machine

    here = machine()
    runtimes = [_runtime(*entry) for entry in bar((*installable(), *TOOLS), "runtimes", delay=AFTER, leave=False)]
    value = {
        "python": platform.python_version(),
        "versions": manifest.versions(),
        "imported_from": {name: folder for name in PACKAGES if (folder := _folder(name)) is not None},
        "machine": here,
        "devices": ["cpu", *here["gpus"]],
        "int8_products": _INT8[exact_int8()].partition(":")[0],
        "runtimes": runtimes,
    }
    return result(args, value, _text(value))


def _folder(module: str) -> str | None:
    """Where a module is imported from; None if it is not here."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent package that is not there; a module in sys.modules without a spec
        return None
    if spec is None:
        return None
    return str(Path(spec.origin).parent) if spec.origin else next(iter(spec.submodule_search_locations or []), None)


def _runtime(name: str, module: str, distributions: tuple[str, ...], needs: str) -> dict[str, Any]:
    if _folder(module) is None:
        return {"name": name, "installed": False, "version": None, "needs": needs}
    version = next(iter(manifest.versions(distributions).values()), None)
    runtime: dict[str, Any] = {"name": name, "installed": True, "version": version}
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


def _text(value: dict[str, Any]) -> str:
    machine = value["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    lines = [
        f"{machine['system']}, {machine['processor']}, {machine['cpus']} cores, {machine['memory_gib']} GiB, {gpus}",
        f"int8 products {_INT8[exact_int8()]}",
        f"Python {value['python']}, " + ", ".join(f"{name} {version}" for name, version in value["versions"].items()),
        "",
    ]
    for runtime in value["runtimes"]:
        details = [*runtime.get("providers", []), *runtime.get("devices", [])]
        if "cpu_default" in runtime:
            details.append(f"computes in {runtime['cpu_default']} by default")
        state = runtime["version"] or "version unknown" if runtime["installed"] else "missing"
        state += f" ({', '.join(details)})" if details else ""
        if "needs" in runtime:
            state += f"; needs {runtime['needs']}" if runtime["installed"] else f": {runtime['needs']}"
        lines.append(f"{runtime['name']:20} {state}")
    lines += ["", "imported from", *(f"{name:20} {folder}" for name, folder in value["imported_from"].items())]
    return "\n".join(lines)

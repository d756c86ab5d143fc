"""Whether an engine can run here, asked before it is opened: TensorRT's own answers come late and say little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from exporters.engine import ENGINE, EXTRAS, MODULES, REPORT
from slimdiff import artifacts
from slimdiff.errors import InputError, MissingPackageError, require

__all__ = ["ENGINE", "check_engine", "read_engine"]


def read_engine(folder: Path) -> dict[str, Any]:
    """`engine.json` of a folder, which is checked against its manifest if it has one.

    Raises:
        InputError: if it is no engine's folder, or not what the manifest says.
    """
    if (folder / artifacts.MANIFEST).is_file():
        artifacts.verify_manifest(folder)
    for needed in (REPORT, ENGINE):
        if not (folder / needed).is_file():
            raise InputError(f"there is no {folder / needed}: an engine is a folder that `slimdiff engine` wrote")
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / REPORT} is not JSON ({error}): build the engine again") from error
    if not isinstance(report, dict) or not {"backend", "version", "targets"} <= set(report):
        raise InputError(f"{folder / REPORT} does not say what the engine was built with: build it again")
    return report


def check_engine(folder: Path) -> dict[str, Any]:
    """Hold an engine against what is here.

    Returns:
        what `engine.json` has.

    Raises:
        InputError: if it is damaged, or for another version or GPU.
        MissingPackageError: if the backend or a GPU is not here.
    """
    report = read_engine(folder)
    backend, version, targets = report["backend"], report["version"], report["targets"]
    here = require(MODULES[backend], EXTRAS[backend]).__version__
    if here != version:
        raise InputError(
            f"{folder} was built with {backend} {version}, and {here}, which is here, does not open it: build the "
            f"engine again, or install {version}"
        )
    if not torch.cuda.is_available():
        raise MissingPackageError(
            f"{folder} runs on {', '.join(targets) or 'the GPU that it was built on'}, and there is no GPU here that "
            "torch can use: take the ONNX that it was built from"
        )
    major, minor = torch.cuda.get_device_capability()
    if targets and f"sm{major}{minor}" not in targets:
        raise InputError(
            f"{folder} was built for {', '.join(targets)}, and here is sm{major}{minor}: build it with --target "
            f"sm{major}{minor}"
        )
    return report

"""Can this engine run here? Asked before it is opened: TensorRT's own answers come late and say little.

No TensorRT is imported. The checks find damage, mix-ups and changed machines; they are no signature, so somebody who
rewrites the engine, its report and its manifest together is not found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.engine.backends import BACKENDS, installed_version
from exporters.engine.gpu import AskGpu, gpu_here
from exporters.engine.shapes import profiles_of, shape_text
from exporters.layout import ENGINE as ENGINE
from exporters.layout import STEP
from exporters.registry import runtime_of
from slimdiff.errors import InputError, MissingPackageError
from slimdiff.storage import manifest as manifests

REPORT = "engine.json"


def check_engine(folder: Path | str, runtime: str | None = None, *, gpu: AskGpu = gpu_here) -> dict[str, Any]:
    """Hold an engine against its manifest, and against what is installed here.

    Returns:
        what `engine.json` has; see `build_engine`.

    Raises:
        InputError: in one line, what differs and what to do: a file that was changed, an engine of another runtime or
            version, or for another GPU.
        MissingPackageError: if the backend or a GPU is missing.
    """
    folder = Path(folder)
    report = read_engine(folder)
    backend = report["backend"]
    if runtime not in (None, backend):
        raise InputError(f"{folder} is an engine for {backend}, which {runtime} does not run: say {backend}")
    version, here = _version(report), installed_version(backend)
    if here is None:
        row = runtime_of(backend)
        raise MissingPackageError(
            f"{folder} is an engine for {backend} {version}, and {row.module} is not installed: "
            f"pip install 'slimdiff[{row.extra}]'"
        )
    if here != version:
        raise InputError(
            f"{folder} was built with {backend} {version}, and {here} is installed, which does not open it: build the "
            f"engine again, or install {version}"
        )
    found = gpu()
    if found is None:
        raise MissingPackageError(
            f"{folder} runs on {_place(report)}, and there is no GPU here (or no driver): use the ONNX that it was "
            "built from"
        )
    if found.capability not in capabilities(report):
        raise InputError(
            f"{folder} was built for {_place(report)}, and here is {found.name} ({found.capability}): build it "
            + (f"with --target {found.capability}" if backend == "tensorrt-rtx" else "on this machine")
        )
    return report


def read_engine(folder: Path) -> dict[str, Any]:
    """What `engine.json` has, once every file is found to be what the manifest says.

    Raises:
        InputError: if it is no engine of ours, was changed, or was built without its weights.
    """
    manifest = manifests.verify_manifest(folder)
    if manifest.get("kind") != "engine":
        raise InputError(
            f"{folder} is {manifest.get('kind')!r}, not an engine: name a folder that `slimdiff engine` wrote"
        )
    engine = in_step if (in_step := f"{STEP}/{ENGINE}") in manifest["files"] else ENGINE
    lacking = [name for name in (engine, REPORT) if name not in manifest["files"]]
    if lacking:
        raise InputError(f"{folder} holds no engine: its manifest does not list {' and '.join(lacking)}")
    report = manifests.read_json(folder / REPORT)
    try:  # whatever is read of it later is read here
        whole = report["backend"] in BACKENDS and manifests.fingerprint(report["parts"]) == report["key"]
        whole = whole and isinstance(report["parts"]["runs_on"].get("targets", []), list)
        place, stripped = runs_on(report), report["parts"].get("options", {}).get("strip_weights")
        _place(report)
        profiles_of(place["shapes"])
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"{folder / REPORT} does not go with itself (its key is not that of its parts): build it again"
        )
    if stripped:
        raise InputError(f"{folder} has no weights (strip_weights): such engines are no longer opened, build it again")
    if manifest["runs_on"] and manifest["runs_on"] != place:
        raise InputError(
            f"{folder / manifests.MANIFEST} and {REPORT} disagree on what the engine runs on: build it again"
        )
    return report


def runs_on(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of where an engine runs: runtime, version, GPUs, shapes, precision."""
    parts = report["parts"]
    return {
        "runtime": report["backend"],
        "version": _version(report),
        **parts["runs_on"],
        "shapes": parts["shapes"],
        "precision": parts["precision"],
    }


def choose_profile(report: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the optimisation profile that takes inputs of these shapes, the first if several do.

    It is 0 for an engine of fixed shapes. The report is `check_engine`'s.

    Raises:
        InputError: if none takes them, naming an input and the shapes of it that the engine was built for.
    """
    profiles = profiles_of(report["parts"]["shapes"])
    odd = set(profiles[0]) ^ set(shapes)
    if odd:
        raise InputError(f"the engine has inputs {', '.join(profiles[0])}; it was given {', '.join(shapes)}")
    misses = [[name for name, ends in profile.items() if not _within(shapes[name], ends)] for profile in profiles]
    if all(misses):
        never = [name for name in profiles[0] if all(name in missed for missed in misses)]
        if not never:
            both = ", ".join(f"{name} {shape_text(shape)}" for name, shape in shapes.items())
            raise InputError(f"the engine takes each of {both}, but has no profile for all of them together")
        name = never[0]
        taken = " or ".join(dict.fromkeys(_range(profile[name]) for profile in profiles))
        raise InputError(
            f"the engine was built for {name} {taken}, not {shape_text(shapes[name])}: build one for that (--batch, "
            "--shapes)"
        )
    return misses.index([])


def _within(shape: Sequence[int], ends: Mapping[str, Sequence[int]]) -> bool:
    low, high = ends["min"], ends["max"]
    return len(shape) == len(low) and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))


def _range(ends: Mapping[str, Sequence[int]]) -> str:
    low, high = shape_text(ends["min"]), shape_text(ends["max"])
    return low if low == high else f"{low} to {high}"


def _version(report: Mapping[str, Any]) -> str:
    """The distribution's, as TensorRT leaves `.post1` and the like out of its own."""
    return report["parts"]["versions"][report["backend"]]


def capabilities(report: Mapping[str, Any]) -> list[str]:
    """Of the GPUs that an engine runs on, e.g. `sm89`."""
    place = report["parts"]["runs_on"]
    return [place["gpu"]["capability"]] if "gpu" in place else place["targets"]


def _place(report: Mapping[str, Any]) -> str:
    place = report["parts"]["runs_on"]
    return f"{place['gpu']['name']} ({place['gpu']['capability']})" if "gpu" in place else ", ".join(place["targets"])

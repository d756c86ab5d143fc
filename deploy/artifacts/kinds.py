"""The kind of an artifact on disk: model, graph, engine, bundle, statistics, plan or build; and its UNet's part."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.layout import ENGINE_PIPELINE, STEP, denoiser_folder, parts_of
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_component, is_part, read_index
from slimdiff.loading.single_file import PICKLES, is_weights_file
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from slimdiff import Plan

ENGINE_REPORT = "engine.json"
_ZSTD = b"\x28\xb5\x2f\xfd"

_SUFFIXES = {".onnx": "onnx", ".safetensors": "statistics", ".json": "plan"}
_MARKS = {
    "build.json": "build",
    "unet/model.onnx": "onnx",
    "transformer/model.onnx": "onnx",
    "model.onnx": "onnx",
    f"unet/{STEP}/model.onnx": "onnx",
    f"{STEP}/model.onnx": "onnx",
    ENGINE_REPORT: "engine",
    "model_index.json": "model",
    "statistics.safetensors": "statistics",
    "plan.json": "plan",
}
"""The file that a folder of a kind has; the first that is there decides."""

_BY_MANIFEST = ("bundle", "engines", ENGINE_PIPELINE)


def kind_of(name: str) -> str:
    """`model`, `onnx`, `engine`, `engines`, `engine-pipeline`, `bundle`, `statistics`, `plan`, `schedule` or `build`.

    The folder of a denoiser alone (`find_component`) is a model, too. A name that is not on the disk is taken for a
    model (a hub id).

    Raises:
        InputError: if it is on the disk and is none of these.
    """
    path = Path(name)
    if name == "demo" or not path.exists():
        return "model"
    if path.is_file():
        weights = path.suffix == ".safetensors" and is_weights_file(path)
        if path.suffix == ".json" and is_schedule(path):
            return "schedule"
        kind = "model" if weights else _SUFFIXES.get(path.suffix) or ("bundle" if is_archive(path) else None)
    else:
        kind = next((kind for mark, kind in _MARKS.items() if (path / mark).is_file()), None)
        # Parts of bundles and of pipelines look like other kinds: only the manifest tells them apart.
        if (path / manifest.MANIFEST).is_file() and (said := manifest.read_manifest(path)["kind"]) in _BY_MANIFEST:
            kind = said
    if (path.suffix in PICKLES and path.is_file()) or (kind is None and find_component(path)):
        kind = "model"  # a pickle is refused as one
    if kind is None:
        if is_part(path):
            read_index(path)
        raise InputError(
            f"{name} is nothing that slimdiff knows: a diffusers pipeline directory, a safetensors file of a whole "
            "model, an ONNX file or folder, an engine folder, a bundle, statistics, a plan or a build folder"
        )
    return kind


def not_runnable(name: str, kind: str) -> InputError:
    """What to say of an artifact that holds no denoiser."""
    return InputError(f"{name} is {kind if kind == 'statistics' else f'a {kind}'}: name a model or an ONNX folder")


def is_schedule(path: Path) -> bool:
    """Whether a JSON file says which steps are guided."""
    with suppress(InputError):
        content = manifest.read_json(path)
        return isinstance(content, dict) and {"guided", "whole"} <= content.keys()
    return False


def is_archive(path: Path) -> bool:
    """Whether a file begins like the archive of a bundle."""
    try:
        with path.open("rb") as file:
            return file.read(len(_ZSTD)) == _ZSTD
    except OSError:
        return False


def graph_of(name: str, *, verified: bool = True) -> Path:
    """The denoiser's graph of an ONNX file or folder, or the folder with its parts; a folder with a manifest is checked
    against it, if `verified`.

    Raises:
        InputError: if there is none, it is a part alone, or it is not what the manifest says.
    """
    path = Path(name)
    inside = denoiser_folder(path)
    found = next((f for f in (path, inside / "model.onnx", path / "model.onnx") if f.is_file()), None)
    found = found or next((folder for folder in (inside, path) if parts_of(folder)), None)
    if found is None or not (found.suffix == ".onnx" or found.is_dir()):
        raise InputError(f"{name} holds no ONNX graph: name a folder with unet/model.onnx or model.onnx, or the file")
    if found.is_file() and found.parent in parts_of(whole := found.parent.parent).values():
        raise InputError(f"{name} is a part of the denoiser in {whole}: name that folder")
    if verified and path.is_dir() and (path / manifest.MANIFEST).is_file():
        manifest.verify_manifest(path)
    return found


def engine_of(name: str, kind: str) -> Path:
    """The folder of the denoiser's engine; `kind` is `kind_of(name)`."""
    return denoiser_folder(name) if kind == ENGINE_PIPELINE else Path(name)


def plan_beside(graph: Path) -> Plan | None:
    """The plan in the `config.json` beside a slim graph; None for a dense one."""
    from slimdiff import Plan

    config = (graph if graph.is_dir() else graph.parent) / "config.json"
    if not config.is_file():
        return None
    content = manifest.read_json(config)
    if not isinstance(content, dict):
        raise InputError(f"{config} is not a model's config: it is no JSON object")
    plan = content.get("slim_plan")
    return Plan.parse(plan, str(config)) if plan else None

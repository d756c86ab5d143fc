"""A Triton model repository from an exported pipeline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.artifacts.usage import usage_of
from deploy.triton.components import Component, find_components
from deploy.triton.config import FILES, PIPELINE, component_config, pipeline_config
from deploy.triton.server import text_to_image
from deploy.triton.settings import TritonSettings
from exporters.graphs.reading import weight_files
from exporters.layout import INDEX, SAFETY_CHECKER, check_carried, is_component
from slimdiff.errors import InputError, require
from slimdiff.loading.naming import read_index
from slimdiff.schedule import FILE, MOST_STEPS, Schedule
from slimdiff.storage import manifest

_SERVER = Path(text_to_image.__file__).parent


def write_repository(
    source: Path, out: Path, settings: TritonSettings | None = None, *, usage: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write what a Triton server needs to turn prompts into images.

        models/unet/             `config.pbtxt`, and the graph or engine in `1/`; so are the text encoders,
                                 vae_decoder and a safety_checker; of a UNet in parts, there are unet_prompt, unet_time
                                 and unet_step in its place; by a schedule, unet_shallow beside it
        models/text_to_image/    the model that clients call, in Python: diffusers' pipeline over the others
                                 and by the schedule that the source has
        compose.yaml             makes the server's image, with diffusers in it, and starts it
        client.py                asks it for an image

    Files of weights that are there already, in a source around the repository or in another of its models, are the same
    files (hard links) where the disk can do that, and copies elsewhere.

    Args:
        source: a pipeline that `slimdiff export` wrote; engines, where there are some, lie in its models' folders.
        out: a folder, made if need be, with no repository in it.
        usage: `steps` and `guidance` of requests that do not say; what the source knows (`usage_of`) if not given.

    Returns:
        every file written.

    Raises:
        InputError: if the source is none, is damaged, or is a pipeline or engine that cannot be served.
        MissingPackageError: without onnx and tritonclient.
    """
    settings = settings or TritonSettings()
    if (source / manifest.MANIFEST).is_file():
        manifest.verify_manifest(source)
    index = _index(source)
    schedule = Schedule.load(source) if (source / FILE).is_file() else None
    components = find_components(source, index, settings, schedule)
    models = out / "models"
    if models.exists():
        raise InputError(f"{models} is there already: name another folder, so that no old model is served")
    written: dict[Path, Path] = {}
    if source.resolve() in out.resolve().parents:  # which is one artifact with it
        written = {file: file for component in components for file in component.folder.iterdir()}
    for component in components:
        _write_component(component, models / component.name, settings, written)
    _write_pipeline(source, index, components, models / PIPELINE, settings)
    if schedule is not None:
        manifest.write_json(models / PIPELINE / "1" / "pipeline" / text_to_image.SCHEDULE, _kinds(schedule, settings))
    usage = usage_of(str(source)) if usage is None else usage
    manifest.write_json(models / PIPELINE / "1" / "pipeline" / text_to_image.USAGE, dict(usage))
    templates = Environment(
        loader=PackageLoader("deploy.triton"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    packages = {name: version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")}
    engines = [component.made_for for component in components if component.made_for]
    compose = templates.get_template("compose.yaml.j2")
    about = {"image": settings.image, "device": settings.device, "marked": index.get("add_watermarker")}
    text = compose.render(engines=engines, **about, **packages)
    (out / "compose.yaml").write_text(text, encoding="utf-8")
    shutil.copyfile(_SERVER / "client.py", out / "client.py")
    return sorted(p for p in out.rglob("*") if p.is_file())


def check_served(name: str, source: Path | str) -> None:
    """Refuse a pipeline of a class that a server does not run; `source` is what has it."""
    if name not in text_to_image.PIPELINES:
        raise InputError(f"{source} is a {name}; served are {' and '.join(text_to_image.PIPELINES)}")


def _index(source: Path) -> dict[str, Any]:
    """The pipeline's index without what text to image does not use."""
    file = source / INDEX
    if not file.is_file():
        raise InputError(f"{source} is no exported pipeline: it has no {INDEX}; make one with slimdiff export")
    index = read_index(source)
    name = str(index.get("_class_name")).removeprefix("ORT")
    check_served(name, source)
    check_carried(index, file)
    kept: dict[str, Any] = {"_class_name": name}
    for part, value in index.items():
        if part == "feature_extractor" and not is_component(value):
            continue
        if part in text_to_image.PARTS:
            library = text_to_image.PARTS[part]
            if not isinstance(value, list) or value[0] != library:
                raise InputError(f"{file} asks for the {part} {value}: taken is one of {library}")
            kept[part] = value
        elif part in ("vae", "unet", "text_encoder", "text_encoder_2", SAFETY_CHECKER):
            kept[part] = value if is_component(value) else None
        elif isinstance(value, bool):
            kept[part] = value
    return kept


def _write_component(component: Component, folder: Path, settings: TritonSettings, written: dict[Path, Path]) -> None:
    """Write a model.

    Args:
        written: files of a source that are there already, and where; more come to it.
    """
    inside = folder / "1"
    inside.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(component_config(component, settings))
    if component.graph is None:
        _put(component.file, inside / FILES["tensorrt"], written)
        return
    for name in weight_files(component.file, component.graph):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        _put(component.folder / name, inside / name, written)
    require("onnx_ir", "triton").save(component.graph, str(inside / FILES["onnxruntime"]))
    if component.config.parent == component.folder:  # an engine of this graph is held against the plan in there
        shutil.copyfile(component.config, inside / "config.json")


def _put(file: Path, target: Path, written: dict[Path, Path]) -> None:
    """Put a file of the source at a place of the repository: the one that is there already, or else a copy."""
    if (there := written.get(file)) is not None:
        with suppress(OSError):  # of disks without hard links
            os.link(there, target)
            return
    shutil.copyfile(file, target)
    written[file] = target


def _kinds(schedule: Schedule, settings: TritonSettings) -> dict[str, Any]:
    """What the server reads of a schedule: by number of the UNet's calls, which are guided (1) and which are whole.

    Some samplers call it twice a step, or some times more.
    """
    most = min(MOST_STEPS, 2 * settings.max_steps + 12)
    kinds = {calls: zip(*schedule.at(calls).kinds(), strict=True) for calls in range(1, most + 1)}
    rows = {str(n): ["".join(str(int(kind)) for kind in each) for each in pair] for n, pair in kinds.items()}
    return {"calls": {n: dict(zip(("guided", "whole"), pair, strict=True)) for n, pair in rows.items()}}


def _write_pipeline(
    source: Path, index: dict[str, Any], components: list[Component], folder: Path, settings: TritonSettings
) -> None:
    inside = folder / "1" / "pipeline"
    inside.mkdir(parents=True, exist_ok=True)
    size = next(c.outputs["sample"].shape[-2:] for c in components if c.name == "vae_decoder")
    (folder / "config.pbtxt").write_text(pipeline_config(size, settings))
    for name in ("__init__.py", "model.py", "text_to_image.py"):
        shutil.copyfile(_SERVER / name, folder / "1" / name)
    manifest.write_json(inside / INDEX, index)
    described = {}  # what the pipeline has to know of the models
    for component in components:
        sides = {"inputs": component.inputs, "outputs": component.outputs}
        tensors = {side: {name: vars(tensor) for name, tensor in specs.items()} for side, specs in sides.items()}
        described[component.name] = {"batch": component.fixed_batch, **tensors}
        (inside / component.name).mkdir(exist_ok=True)
        shutil.copyfile(component.config, inside / component.name / "config.json")
    manifest.write_json(inside / text_to_image.COMPONENTS, described)
    for part in text_to_image.PARTS:
        if part in index:
            shutil.copytree(source / part, inside / part, dirs_exist_ok=True)

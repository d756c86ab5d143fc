"""A Triton model repository from an exported pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from deploy.triton.components import Component, find_components
from deploy.triton.config import FILES, PIPELINE, component_config, pipeline_config
from deploy.triton.container import write_compose
from deploy.triton.server import text_to_image
from deploy.triton.settings import TritonSettings
from exporters.engine.check import ENGINE
from exporters.graphs.reading import weight_files, write_graph
from exporters.layout import GRAPH
from slimdiff.errors import InputError
from slimdiff.storage import manifest

MODELS = "models"
"""The folder that the server reads."""
_SERVER = Path(text_to_image.__file__).parent


def write_repository(source: Path, out: Path, settings: TritonSettings | None = None) -> list[Path]:
    """Write what a Triton server needs to turn prompts into images.

        models/unet/             `config.pbtxt`, and the graph or engine in `1/`; likewise the text encoders and
                                 vae_decoder
        models/text_to_image/    the model that clients call, in Python: diffusers' pipeline over the others
        compose.yaml             makes the server's image and starts it
        client.py                asks it for an image

    Args:
        source: a pipeline that `slimdiff export` wrote; engines, where there are some, lie in its models' folders.
        out: a folder, made if need be, with no repository in it.
        settings: backend, instances, batching.

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
    components = find_components(source, settings)
    models = out / MODELS
    if models.exists():
        raise InputError(f"{models} is there already: name another folder, so that no old model is served")
    for component in components:
        _write_component(component, models / component.name, settings)
    _write_pipeline(source, index, components, models / PIPELINE, settings)
    write_compose(out / "compose.yaml", settings, [c.made_for for c in components if c.made_for])
    shutil.copyfile(_SERVER / "client.py", out / "client.py")
    return sorted(p for p in out.rglob("*") if p.is_file())


def _index(source: Path) -> dict[str, Any]:
    """The pipeline's index without what text to image does not use."""
    file = source / "model_index.json"
    if not file.is_file():
        raise InputError(f"{source} is no exported pipeline: it has no model_index.json; make one with slimdiff export")
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is no pipeline's index: {error}") from error
    name = str(index.get("_class_name")).removeprefix("ORT")
    if name not in text_to_image.PIPELINES:
        raise InputError(f"{source} is a {name}; served are {' and '.join(text_to_image.PIPELINES)}")
    kept: dict[str, Any] = {"_class_name": name}
    for part, value in index.items():
        if part in text_to_image.PARTS:
            library = text_to_image.PARTS[part]
            if not isinstance(value, list) or value[0] != library:
                raise InputError(f"{file} asks for the {part} {value}: taken is one of {library}")
            kept[part] = value
        elif part == "vae" or part in ("unet", "text_encoder", "text_encoder_2"):
            kept[part] = value if isinstance(value, list) and value[0] is not None else None
        elif isinstance(value, bool):
            kept[part] = value
    return kept


def _write_component(component: Component, folder: Path, settings: TritonSettings) -> None:
    version = folder / "1"
    version.mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(component_config(component, settings))
    if component.graph is None:
        shutil.copyfile(component.folder / ENGINE, version / FILES["tensorrt"])
        return
    for name in weight_files(component.folder / GRAPH, component.graph):
        (version / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(component.folder / name, version / name)
    write_graph(component.graph, version / FILES["onnxruntime"])
    # An engine of this graph is held against the plan in there.
    shutil.copyfile(component.folder / "config.json", version / "config.json")


def _write_pipeline(
    source: Path, index: dict[str, Any], components: list[Component], folder: Path, settings: TritonSettings
) -> None:
    inside = folder / "1" / "pipeline"
    inside.mkdir(parents=True, exist_ok=True)
    sizes = {t.name: t.shape for c in components if c.name == "vae_decoder" for t in c.outputs}
    (folder / "config.pbtxt").write_text(pipeline_config(sizes["sample"][-2:], settings))
    for name in ("__init__.py", "model.py", "text_to_image.py"):
        shutil.copyfile(_SERVER / name, folder / "1" / name)
    manifest.write_json(inside / "model_index.json", index)
    manifest.write_json(inside / text_to_image.COMPONENTS, {c.name: _described(c) for c in components})
    for part in text_to_image.PARTS:
        if part in index:
            shutil.copytree(source / part, inside / part, dirs_exist_ok=True)
    for component in components:
        (inside / component.name).mkdir(exist_ok=True)
        shutil.copyfile(component.folder / "config.json", inside / component.name / "config.json")


def _described(component: Component) -> dict[str, Any]:
    """What the pipeline has to know of a model."""
    sides = {"inputs": component.inputs, "outputs": component.outputs}
    tensors = {
        side: {t.name: {"dtype": t.dtype, "shape": list(t.shape)} for t in specs} for side, specs in sides.items()
    }
    return {"batch": component.fixed_batch, **tensors}

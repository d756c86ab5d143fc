"""What a diffusers directory may ask of whoever opens it: classes that are known, and weights that are tensors alone.

diffusers and transformers take class names, modules to import, files of weights and kernels to fetch from the JSON that
lies in the directory. Here all of it is looked at before they see it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import diffusers.pipelines
import transformers
from diffusers.image_processor import VaeImageProcessor
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import ImageProcessingMixin

from slimdiff.errors import InputError
from slimdiff.loading.naming import CONFIG, INDEX, Component, read_index
from slimdiff.loading.transformers_files import check_vocabulary
from slimdiff.loading.weights import Weights, choose_variant, find_weights, read_headers
from slimdiff.schedule import FILE as SCHEDULE
from slimdiff.storage import manifest

LIBRARIES = ("diffusers", "transformers", "slimdiff.models")
# transformers' Auto classes and diffusers' AutoModel are none of these: they take the class from yet another file.
_MODELS = (diffusers.ModelMixin, transformers.PreTrainedModel)
_CONFIGURED = (
    diffusers.SchedulerMixin,
    transformers.PreTrainedTokenizerBase,
    transformers.ProcessorMixin,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    VaeImageProcessor,
)


@dataclass
class ModelDirectory:
    """What a diffusers directory holds, once it has been looked through.

    Attributes:
        pipeline: its class.
        models: the class and the files of each component that has weights.
        others: the class and the folder of each component that has none.
        values: what else the pipeline is made with; None for components that the index says are none.
    """

    pipeline: type[diffusers.DiffusionPipeline]
    models: dict[str, tuple[Any, Weights]] = field(default_factory=dict)
    others: dict[str, tuple[Any, Path]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def check_model_directory(folder: Path, variant: str | None = None, without: Collection[str] = ()) -> ModelDirectory:
    """Refuse what could run code, leave the directory or is not whole; see `read_index` too.

    A directory with a manifest is checked against it, but for the schedule, which people edit.

    Args:
        variant: of the weights; at least one component must have it.
        without: components that are not needed.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    index = read_index(folder)
    if (folder / manifest.MANIFEST).is_file():
        manifest.verify_manifest(folder, editable=(SCHEDULE,))
    if (folder / "None.py").exists():  # diffusers takes it for the pipeline's own code where none is named
        raise InputError(f"{folder / 'None.py'} would be run by diffusers: refused")
    pipeline = pipeline_class(index.get("_class_name"), folder / INDEX)
    parameters = inspect.signature(pipeline).parameters
    found = ModelDirectory(pipeline)
    for name, entry in index.items():
        if entry == [None, None] or not isinstance(entry, list):
            found.values |= {name: None if isinstance(entry, list) else entry} if name in parameters else {}
            continue
        if name.startswith("_"):
            continue
        kind = library_class(entry, folder / INDEX, _MODELS + _CONFIGURED)
        if not manifest.is_inside(name) or "/" in name:
            raise InputError(f"{folder / INDEX} names a component {name!r}, which is outside the directory: refused")
        if name in without or name not in parameters:
            continue
        # Pipelines of one model may have its files beside the index.
        place = folder if issubclass(kind, _MODELS) and not (folder / name).exists() else folder / name
        if place.is_dir():
            _check_folder(place, kind)
        if issubclass(kind, _MODELS):
            if place == folder and not (folder / "config.json").is_file():
                raise InputError(f"{folder / INDEX} names a {name}, and there is no such folder: copy the model whole")
            found.models[name] = (kind, find_weights(place, kind))
        else:
            found.others[name] = (kind, folder / name)
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    unsaid = [n for n, p in parameters.items() if p.default is p.empty and p.kind is positional and n not in index]
    found.values |= dict.fromkeys(n for n in unsaid if n in pipeline._optional_components)
    if unsaid := [n for n in unsaid if n not in (*pipeline._optional_components, *without)]:
        raise InputError(f"{folder / INDEX} says nothing of the {', '.join(unsaid)}: give it, or say [null, null]")
    choose_variant((weights for _, weights in found.models.values()), variant, folder)
    return found


def check_component(component: Component) -> tuple[Any, Weights]:
    """The class and the files of a denoiser alone; refused is what a whole directory would be refused for.

    Of a pipeline with a manifest, its part is checked against that.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    folder, above = component.folder, component.pipeline
    if above is not None and (above / manifest.MANIFEST).is_file():
        manifest.verify_manifest(above, under=f"{folder.name}/")
    library = "slimdiff.models" if component.kind.startswith("Slim") else "diffusers"
    kind = library_class([library, component.kind], folder / CONFIG, _MODELS)
    _check_folder(folder, kind)
    return kind, find_weights(folder, kind)


def pipeline_class(name: Any, where: Path) -> type[diffusers.DiffusionPipeline]:
    """diffusers' pipeline class of that name.

    Raises:
        InputError: if it has none; classes of the directory's own are not taken.
    """
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (inspect.isclass(kind) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise InputError(f"{where} names the pipeline {name!r}, which this diffusers does not have")
    return kind


def library_class(entry: Any, where: Path, bases: tuple[type, ...] = _CONFIGURED) -> Any:
    """The class that an entry `[library, class]` of `model_index.json` names.

    Args:
        bases: it must be a subclass of one of these; by default what has no weights.

    Raises:
        InputError: for other libraries than diffusers and transformers, or for another kind of class.
    """
    two = isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    if not two:
        raise InputError(f"{where} names {entry!r} where a library and its class are named")
    library, name = entry
    module = importlib.import_module(library) if library in LIBRARIES else _pipeline_module(library)
    if module is None:
        raise InputError(f"{where} asks for {library}.{name}; taken are {', '.join(LIBRARIES)}: no other code is run")
    found = getattr(module, name, None)
    if found is None and library == "transformers":  # what was a feature extractor is an image processor now
        found = getattr(module, name.replace("FeatureExtractor", "ImageProcessor"), None)
    if found is None:
        raise InputError(f"{where} asks for {library}.{name}, which this {library} does not have")
    if not (inspect.isclass(found) and issubclass(found, bases)):
        raise InputError(f"{where} asks for {library}.{name}, which is no class that belongs there: refused")
    return found


def _pipeline_module(library: str) -> ModuleType | None:
    """A module of `diffusers.pipelines`, such as that of Stable Diffusion's safety checker."""
    found = getattr(diffusers.pipelines, library, None)
    inside = isinstance(found, ModuleType) and found.__name__ == f"diffusers.pipelines.{library}"
    return found if inside else None


def _check_folder(folder: Path, kind: Any) -> None:
    check_vocabulary(kind, folder)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} holds an adapter_config.json, which names another model: fuse the adapter first")
    if (folder / "config.json").exists():
        for value in _values(manifest.read_json(folder / "config.json"), "attn_implementation"):
            if not isinstance(value, str) or not value.isidentifier():  # a repository of kernels, to be fetched and run
                raise InputError(f"{folder / 'config.json'} asks for the attention {value!r}: refused")
    for file in sorted(folder.glob("*.safetensors")):
        read_headers([file])


def _values(content: Any, key: str) -> Iterator[Any]:
    """Everything that is said under a key, or the same with an underscore, at any depth of a configuration."""
    if isinstance(content, dict):
        for name, value in content.items():
            if name.removeprefix("_") == key and value is not None:
                yield value
            else:
                yield from _values(value, key)
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)

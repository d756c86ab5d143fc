"""A diffusers pipeline whose denoiser, VAE and text encoders run in another runtime."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import is_invisible_watermark_available

from exporters.layout import (
    CONFIGURED,
    INDEX,
    autoencoder_of,
    check_carried,
    components_of,
    denoiser_folder,
    denoiser_of,
)
from exporters.runtimes.denoiser import GraphDenoiser
from exporters.runtimes.module import refuse_torchs_own
from exporters.runtimes.scheduled import schedule_graphs
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
from slimdiff.loading.model_directory import library_class, pipeline_class
from slimdiff.loading.naming import read_index
from slimdiff.loading.transformers_files import check_vocabulary
from slimdiff.schedule import FILE, Schedule
from slimdiff.storage import manifest


def load_pipeline(
    folder: Path | str,
    runtime: str = "onnxruntime",
    *,
    threads: int | None = None,
    unet: Any = None,
    vae: Any = None,
    checked: bool = False,
    scheduled: bool = True,
) -> DiffusionPipeline:
    """Load a folder in optimum's layout, which `slimdiff export` wrote, or one with engines in the same places.

    The pipeline is diffusers' own class, so that its schedulers, callbacks and `from_pipe` (to image to image, or to
    inpainting) are what they are in torch. Graphs of a fixed batch make that many images at once (half of it with
    guidance), and no other number.

    Args:
        folder: with `model_index.json`, a folder per component, scheduler and tokenizers.
        threads: of a runtime on the CPU; its own choice if not given.
        unet, vae: take the place of the folder's own denoiser and autoencoder (vqvae, too), which is then not opened.
        checked: whether the folder was held against its manifest already.
        scheduled: whether the folder's own denoiser makes its images by the schedule beside `model_index.json`, if
            there is one.

    Raises:
        InputError: if the folder is none of ours or not what its manifest says, or a component cannot be opened.
        MissingPackageError: if the runtime is not here.
    """
    folder = Path(folder)
    index, kind = check_index(folder)
    if not checked and (folder / manifest.MANIFEST).is_file():
        manifest.verify_manifest(folder)
    if index.get("add_watermarker") and not is_invisible_watermark_available():
        raise MissingPackageError(f"{folder} marks its images, which takes a package: pip install invisible-watermark")
    parts: dict[str, Any] = {}
    rows, replaced = components_of(index), {denoiser_of(index): unet, autoencoder_of(index): vae}
    for name in inspect.signature(kind).parameters:
        value = index.get(name)
        with _explained(folder, name):
            if not isinstance(value, list):
                parts |= {name: value} if name in index else {}
            elif replaced.get(name) is not None:
                parts[name] = replaced[name]
            elif value[:1] in ([], [None]):
                parts[name] = None
            elif name in rows and rows[name].opens:
                parts[name] = rows[name].load("opens").open_in(folder, name, runtime, threads)
            else:
                parts[name] = _from_library(folder, name, value)
    with _explained(folder, kind.__name__):
        pipeline = kind(**parts)
    _take_size(pipeline)
    refuse_torchs_own(pipeline)
    if scheduled and unet is None and (folder / FILE).is_file():
        return schedule_graphs(pipeline, Schedule.load(folder), denoiser_folder(folder), runtime, threads)
    return pipeline


def _take_size(pipeline: Any) -> None:
    """Let a pipeline that is asked for no size make images of the size that its transformer's graph is for."""
    own = getattr(pipeline, "transformer", None)
    height, width = own.latents if isinstance(own, GraphDenoiser) else (None, None)
    if height is not None and height == width and hasattr(pipeline, "default_sample_size"):
        pipeline.default_sample_size = height


def check_index(folder: Path) -> tuple[dict[str, Any], type[DiffusionPipeline]]:
    """The content of a folder's `model_index.json` and the pipeline that it names; nothing is opened for that.

    Raises:
        InputError: if it names other classes than those of diffusers and transformers, no denoiser, or a component
            that exported pipelines cannot have.
    """
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is no exported pipeline: it has no {INDEX}; make one with `slimdiff export`")
    index = read_index(folder)
    if (denoiser := denoiser_of(index)) is None:
        raise InputError(f"{folder / INDEX} names no unet and no transformer: only pipelines with one are exported")
    if any((folder / denoiser).glob("*.safetensors")):
        raise InputError(f"{folder} is a model in torch, not in ONNX: export it first with `slimdiff export`")
    kind = pipeline_class(str(index.get("_class_name", "")).removeprefix("ORT"), folder / INDEX)
    check_carried(index, folder / INDEX)
    for name in CONFIGURED:
        if isinstance(entry := index.get(name), list) and entry[:1] not in ([], [None]):
            library_class(entry, folder / INDEX, *([(SchedulerMixin,)] if name.endswith("scheduler") else []))
    return index, kind


def _from_library(folder: Path, name: str, entry: list[Any]) -> Any:
    """A scheduler, a tokenizer or a feature extractor, of a class that the two libraries bring: no other code."""
    kind = library_class(entry, folder / INDEX)
    check_vocabulary(kind, folder / name)
    return kind.from_pretrained(folder / name, local_files_only=True)


@contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    """Both libraries, and the classes here that follow them, raise anything from OSError to KeyError for odd files."""
    try:
        yield
    except SlimdiffError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"the {name} in {folder} could not be loaded: {reason[0]}") from error

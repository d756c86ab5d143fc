"""Opening a bundle: checked first, then in the best runtime that is here."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts.usage import usage_of
from deploy.bundle.archive import unpack
from deploy.bundle.description import Bundle, Denoiser, read_bundle
from exporters.layout import autoencoder_of
from exporters.registry import names, runtime_of
from exporters.runtimes.denoiser import open_denoiser
from exporters.runtimes.pipeline import check_index, load_pipeline
from exporters.runtimes.scheduled import schedule_graphs
from exporters.runtimes.vae import VAE
from slimdiff.denoising.trajectory import denoiser_name
from slimdiff.errors import InputError, MissingPackageError, SlimdiffError
from slimdiff.schedule import FILE, Schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger("slimdiff")


@dataclass(frozen=True)
class Chosen:
    """Which denoiser of a bundle runs in what, and why."""

    denoiser: Denoiser
    runtime: str
    """Of `exporters.runtimes`."""
    title: str
    """With its version and device, for people."""
    why: str
    passed_over: tuple[str, ...]
    """What would have come before it, each with the reason why it is not."""


def load(
    path: Path | str,
    runtime: str | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    threads: int | None = None,
    unpack_to: Path | str | None = None,
    scheduled: bool = True,
) -> DiffusionPipeline:
    """A diffusers pipeline of a bundle, on the best runtime that is here.

    Every file is held against the manifest before any is used. Best is an engine for the GPU that is here, then ONNX
    Runtime on a GPU, then OpenVINO and ONNX Runtime on the CPU, as far as the bundle is meant for them.

    Args:
        path: a bundle's folder, or an archive of one.
        runtime: that and no other, of `exporters.runtimes`.
        height, width: of the images in pixels, for a bundle of several sizes. Squares are then the pipeline's default;
            give other sizes to its calls, too (diffusers' pipelines have one number).
        threads: of a runtime on the CPU; its own choice if not given.
        scheduled: whether images are made by the bundle's schedule, where it has one (the attribute `schedule`).
        unpack_to: a folder that an archive is unpacked into, to stay there; by default one that goes with the pipeline.

    Returns:
        the pipeline; its attribute `chosen` (`Chosen`) says the runtime and the reason, and `usage` the `steps` and the
        `guidance` that it was calibrated with, where that is known.

    Raises:
        InputError: if it is no bundle, not what its manifest says, or has nothing for that runtime or size.
        MissingPackageError: if none of the runtimes that it is meant for is here.
    """
    path = Path(path)
    with ExitStack() as unless_opened:
        if path.is_file():
            if unpack_to is None:
                scratch = tempfile.mkdtemp(prefix="slimdiff-bundle-")
                unless_opened.callback(shutil.rmtree, scratch, ignore_errors=True)
                unpack_to = Path(scratch) / "bundle"
            path = unpack(path, Path(unpack_to))
        elif not path.is_dir():
            raise InputError(f"{path}: there is no such bundle, folder or archive")
        elif unpack_to is not None:
            raise InputError(f"{path} is a folder: only an archive is unpacked")
        pipeline: Any = _open(read_bundle(path), runtime, height, width, threads)
        pipeline.schedule = Schedule.load(path) if (path / FILE).is_file() else None
        if scheduled and pipeline.schedule is not None:
            source, name = Path(getattr(pipeline, denoiser_name(pipeline)).session.source), pipeline.chosen.runtime
            pipeline = schedule_graphs(pipeline, pipeline.schedule, source, name, threads)
        weakref.finalize(pipeline, unless_opened.pop_all().close)
    return pipeline


def _open(
    bundle: Bundle, runtime: str | None, height: int | None, width: int | None, threads: int | None
) -> DiffusionPipeline:
    decoder = autoencoder_of(check_index(bundle.folder)[0])
    ways = _ways(bundle, runtime, height, width)
    passed_over: list[str] = []
    failed: SlimdiffError | None = None
    for denoiser, name in ways:
        folder = bundle.folder / denoiser.folder
        try:
            unet = open_denoiser(folder, name, threads)
        except (MissingPackageError, InputError) as error:
            if runtime is not None or len(ways) == 1 or (isinstance(error, InputError) and not denoiser.is_engine):
                raise
            failed = error
            passed_over.append(f"{denoiser.name} in {name}: {error}")
            continue
        beside = _beside(name)
        vae = decoder and denoiser.vae and VAE.open_in(bundle.folder / denoiser.vae, decoder, beside, threads)
        pipeline: Any = load_pipeline(bundle.folder, beside, threads=threads, unet=unet, vae=vae, checked=True)
        chosen = Chosen(denoiser, name, unet.session.runtime, _why(denoiser, runtime, failed), tuple(passed_over))
        log.info("bundle: %s in %s, %s", denoiser, chosen.title, chosen.why)
        pipeline.chosen, pipeline.usage = chosen, usage_of(str(bundle.folder))
        return pipeline
    raise MissingPackageError(f"nothing of {bundle.folder} runs here: {'; '.join(passed_over)}")


def _ways(bundle: Bundle, runtime: str | None, height: int | None, width: int | None) -> list[tuple[Denoiser, str]]:
    """Ways to run a bundle, best first."""
    known = names("graph", "engine")
    if runtime not in (None, *known):
        raise InputError(f"there is no runtime {runtime!r} for bundles; there is {', '.join(known)}")
    denoisers = bundle.description.denoisers
    fitting = [d for d in denoisers if d.height in (None, height or d.height) and d.width in (None, width or d.width)]
    if not fitting:
        there = ", ".join(dict.fromkeys(f"{d.height}x{d.width}" for d in denoisers))
        raise InputError(f"{bundle.folder} has no denoiser for {height or '*'}x{width or '*'} pixels; there is {there}")
    ways = [
        (d, r)
        for d in fitting
        for r in (d.runtimes if runtime is None or d.is_engine else names("graph"))
        if runtime in (None, r)
    ]
    if not ways:
        there = ", ".join(dict.fromkeys(r for d in fitting for r in d.runtimes))
        raise InputError(f"{bundle.folder} has nothing that {runtime} runs; it is meant for {there}")
    # In half precision GPUs are faster, and CPUs slower.
    return sorted(ways, key=lambda way: (runtime_of(way[1]).rank, (way[0].precision == "fp16") != _on_gpu(way[1])))


def _beside(runtime: str) -> str:
    """What the VAE and the text encoders, which are graphs, run in beside a denoiser in this runtime."""
    if _on_gpu(runtime):
        with suppress(ImportError):
            import onnxruntime

            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                return "onnxruntime-cuda"
    return runtime if runtime in names("graph") else "onnxruntime"


def _on_gpu(runtime: str) -> bool:
    return runtime_of(runtime).device == "gpu"


def _why(denoiser: Denoiser, asked: str | None, failed: SlimdiffError | None) -> str:
    if asked is not None:
        return "which was asked for"
    if denoiser.is_engine:
        return "an engine for the GPU that is here"
    if failed is None:
        return f"the {'only runtime' if len(denoiser.runtimes) == 1 else 'best'} that it is meant for"
    return f"the best that is here of what it is meant for ({failed})"

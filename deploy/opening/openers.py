"""Opening what a user names on the command line: a model, a graph, an engine, a bundle, statistics, a plan, a build."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts.kinds import ENGINE_REPORT, engine_of, graph_of, kind_of, not_runnable
from deploy.artifacts.usage import usage_of
from exporters.dtypes import PRECISIONS
from exporters.layout import ENGINE_PIPELINE, denoiser_folder, parts_of
from exporters.registry import names
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_component

if TYPE_CHECKING:
    from torch import Tensor

    from slimdiff.denoising.trajectory import Call
    from slimdiff.settings import Lora, Sampling, SteeringSettings


@dataclass
class Opened:
    """An artifact whose denoiser can be called."""

    kind: str
    """`model` (in torch), or `onnx`, `engine`, `engine-pipeline`, `bundle` (in a runtime of `exporters.runtimes`)."""
    denoiser: Any
    predict: Callable[[Call], Tensor]
    runtime: str = "torch"
    """Its name."""
    pipeline: Any = None
    """The whole pipeline, for a whole model or a bundle."""
    usage: dict[str, Any] = field(default_factory=dict)
    """What it was calibrated with; see `usage_of`."""

    @property
    def precision(self) -> str:
        """`fp32`, `fp16` or `bf16`, as the denoiser computes."""
        if self.kind != "model":
            return self.denoiser.session.precision
        name = str(self.denoiser.dtype).removeprefix("torch.")
        return PRECISIONS.get(name, name)

    def sampling(self, asked: Sampling, pipeline: Any) -> Sampling:
        """`asked`, as far as a graph's fixed shapes allow: its batch decides how many images go through it at once.

        Args:
            pipeline: that the denoiser runs in.

        Raises:
            InputError: if the batch is no whole number of images.
        """
        from slimdiff.denoising.tasks import samples_per_image

        batch = None if self.kind == "model" else self.denoiser.batch
        if not isinstance(batch, int):
            return asked
        samples = samples_per_image(pipeline, asked)
        if batch % samples:
            raise InputError(
                f"this graph takes batches of {batch}, and an image with guidance takes {samples} samples: export for "
                "that guidance (slimdiff export --guidance), with --dynamic batch, or use --guidance 1"
            )
        return asked.model_copy(update={"batch": batch // samples})

    def fitted(self, asked: Sampling, pipeline: Any, name: str) -> Sampling:
        """`sampling`, with the size of the images, too, that a graph's fixed shapes are for.

        Raises:
            InputError: if another size is asked for; `name` is the artifact's.
        """
        fixed = self.pixels(pipeline)
        if any(getattr(asked, side) not in (None, pixels) for side, pixels in fixed.items()):
            sides = " x ".join(map(str, fixed.values()))
            raise InputError(f"{name} makes images of {sides} alone: leave out --height and --width")
        return self.sampling(asked, pipeline).model_copy(update=fixed)

    def pixels(self, pipeline: Any) -> dict[str, int]:
        """Height and width of the images that a graph's fixed shapes are for; nothing for a model, nor where a call has
        no say in them: neither a size nor a picture."""
        takes = inspect.signature(pipeline.__call__).parameters
        if self.kind == "model" or not {"height", "image"} & takes.keys():
            return {}
        from slimdiff.denoising.sizes import pixels_per_latent

        sides, scale = self.denoiser.latents, pixels_per_latent(pipeline)
        return {k: s * scale for k, s in zip(("height", "width"), sides, strict=True) if isinstance(s, int)}


def open_denoiser(
    name: str,
    runtime: str | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    variant: str | None = None,
    lora: Sequence[Lora] = (),
    rest: str | None = None,
    steering: SteeringSettings | None = None,
    threads: int | None = None,
) -> Opened:
    """Open a model in torch, an ONNX graph in a runtime that takes graphs, an engine in its own, or a bundle.

    Args:
        runtime: of `exporters.runtimes`; for ONNX `onnxruntime` if not given, for a bundle the best that is here; an
            engine has but one.
        height, width: of the images, pixels, where a bundle has denoisers for several sizes.
        variant: of a model's weights.
        lora: fused into a model's weights.
        rest: the model that gives the other components to a component folder; without one it is opened with the
            pipeline that it lies in, or alone.
        steering: added to a model.
        threads: of a runtime on the CPU; its own choice if not given.

    Raises:
        InputError: if it is none of them, a LoRA or a ControlNet is to go into what is no model, or that runtime does
            not take it.
        MissingPackageError: if the runtime is not here.
    """
    kind = kind_of(name)
    if lora and kind != "model":
        raise InputError(
            f"{name} holds weights that no LoRA can be fused into any more ({kind}): fuse it before the export, with "
            "slimdiff export MODEL --lora FILE"
        )
    if steering and kind != "model":
        raise InputError(
            f"{name} takes no ControlNet or adapter any more ({kind}): add it at export, with slimdiff export MODEL "
            "--controlnet DIR"
        )
    if kind == "bundle":
        from deploy.bundle.load import load
        from slimdiff.denoising.trajectory import denoiser_name

        whole: Any = load(name, runtime, height=height, width=width, threads=threads, scheduled=False)
        denoiser: Any = getattr(whole, denoiser_name(whole))
        return Opened(kind, denoiser, denoiser.predict, whole.chosen.runtime, whole, whole.usage)
    chosen = runtime_for(name, kind, runtime)
    if kind == "model":
        from deploy.artifacts.figures import denoiser_of
        from slimdiff.denoising.trajectory import predict
        from slimdiff.loading.pipelines import load_denoiser, load_pipeline

        component, pipeline = find_component(name), None
        if component is not None and not (component.pipeline or rest or lora or steering):
            denoiser = load_denoiser(name, "fp32", variant)
        else:
            more: Any = {"lora": lora, "rest": rest if component else None, "steering": steering}
            pipeline = load_pipeline(name, "fp32", variant=variant, **more)
            denoiser = denoiser_of(pipeline)
        return Opened(kind, denoiser, partial(predict, denoiser), pipeline=pipeline, usage=usage_of(name))
    from exporters.runtimes.denoiser import open_denoiser as open_graph

    opened = open_graph(graph_of(name) if kind == "onnx" else engine_of(name, kind), chosen, threads)
    return Opened(kind, opened, opened.predict, chosen, usage=usage_of(name))


def runtime_for(name: str, kind: str, runtime: str | None) -> str:
    """The runtime that takes an artifact: the one that was asked for, or else the first that does.

    Raises:
        InputError: if it is nothing to be run, or that runtime does not take it.
    """
    if kind == "model":
        if runtime not in (None, "torch"):
            raise InputError(f"{name} is a model in torch: export it first (slimdiff export) to run it in {runtime}")
        return "torch"
    if kind == "engines":
        there = ", ".join(sorted(p.parent.name for p in Path(name).glob(f"*/{ENGINE_REPORT}")))
        raise InputError(f"{name} holds several engines: name one of them ({there})")
    if kind not in ("onnx", "engine", ENGINE_PIPELINE):
        raise not_runnable(name, kind)
    takes = names("graph")
    if kind != "onnx":
        from exporters.engine.check import read_engine

        takes = (read_engine(engine_of(name, kind))["backend"],)
    chosen = runtime or takes[0]
    if chosen in takes:
        return chosen
    if chosen == "torch":
        remedy = "name the model that it was made from"
    elif kind == "onnx":
        remedy = "build an engine of it (slimdiff engine)"
    else:
        remedy = f"leave out --runtime for {takes[0]}, or name the ONNX folder that it was built from"
    raise InputError(f"{name} is {'ONNX' if kind == 'onnx' else 'an engine'}, which {chosen} does not run: {remedy}")


def vae_of(opened: Opened, name: str) -> Any:
    """The VAE that an artifact runs beside its denoiser; None for a model in torch, and for a denoiser alone."""
    if opened.kind == "bundle":
        return opened.pipeline.vae
    if opened.kind == "model" or not (Path(name) / "vae_decoder").is_dir():
        return None
    from exporters.runtimes.vae import VAE

    return VAE.open(name, opened.runtime)


def whole_pipeline(
    opened: Opened, name: str, rest: str | None, variant: str | None = None, threads: int | None = None
) -> Any:
    """A pipeline that makes images with what was opened.

    Args:
        rest: the model, or the folder of a whole pipeline in ONNX or of engines, that gives the other components to a
            graph or an engine; without one, the folder's own.
        variant: of that model's weights.
        threads: of a runtime on the CPU; its own choice if not given.

    Raises:
        InputError: for a lone graph or engine and no `rest`.
    """
    if opened.pipeline is not None:
        return opened.pipeline
    from exporters.runtimes.pipeline import load_pipeline as load_graphs

    folder = Path(rest or name)
    if (kind := kind_of(str(folder))) == ENGINE_PIPELINE:
        return load_graphs(folder, runtime_for(str(folder), kind, None), threads=threads, unet=opened.denoiser)
    if rest is not None and not ((own := denoiser_folder(folder)) / "model.onnx").is_file() and not parts_of(own):
        from slimdiff.compression import with_denoiser
        from slimdiff.loading.pipelines import load_pipeline

        return with_denoiser(load_pipeline(rest, "fp32", variant=variant), opened.denoiser)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{name} is a denoiser alone: say with --pipeline which model's other components it goes with")
    beside = opened.runtime if opened.kind == "onnx" else "onnxruntime"
    return load_graphs(folder, beside, threads=threads, unet=opened.denoiser)

"""A pipeline's components besides the denoiser, in ONNX: copied from an exported folder, or exported from a model.

Both leave a safety checker out unless `safety_checker`, have the pipeline's class (`kind`), `denoiser`, the name of the
component that denoises, `decoder`, the folder of what makes images of latents (None where the images themselves are
denoised), `scale`, pixels per latent along a side, `controls`, how many pictures steer an image, `shown`, whether an
IP-Adapter takes a picture as a prompt, `takes`, the arguments of the pipeline's call (`control_image` where `image`
steers), and `write(folder, precision, sizes, encoder)`, which writes tokenizers, scheduler and graphs in optimum's
layout:

    folder       of the bundle
    precision    of what is exported; what was exported before stays as it is
    sizes        of the latents that a VAE is needed for; each goes where `place_of` says
    encoder      whether the VAE's encoder goes along, for image to image
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from deploy.artifacts.usage import usage_of, use
from deploy.bundle.description import allowed
from exporters.graphs.reading import inputs_of, read_graph
from exporters.layout import (
    DENOISERS,
    FOLDERS,
    GRAPH,
    IMAGE_ENCODER,
    INDEX,
    autoencoder_of,
    check_carried,
    components_of,
    denoiser_folder,
    denoiser_of,
    latent_scale,
    read_config,
    steering_folders,
    without_safety_checker,
)
from exporters.runtimes.pipeline import check_index
from slimdiff.denoising.steering import has_ip_adapter, nets_of
from slimdiff.denoising.trajectory import denoiser_name
from slimdiff.errors import InputError
from slimdiff.loading.naming import read_index
from slimdiff.settings import Sampling, SteeringSettings
from slimdiff.storage import manifest

Latents = tuple[int | None, int | None]
"""Height and width of what a denoiser denoises; None where it takes any."""


def place_of(size: Latents, sizes: Sequence[Latents]) -> str:
    """The folder, below the bundle, with the VAE for that size: `.` for the first."""
    return "." if size == sizes[0] else f"sizes/{size[0]}x{size[1]}"


class ExportedRest:
    """The folder of a whole pipeline, which `slimdiff export` wrote: its VAE is for one size."""

    def __init__(self, folder: Path, safety_checker: bool = True) -> None:
        self.folder, self.safety_checker = folder, safety_checker
        if (folder / manifest.MANIFEST).is_file():
            manifest.verify_manifest(folder)

    @cached_property
    def kind(self) -> Any:
        return check_index(self.folder)[1]

    @cached_property
    def denoiser(self) -> str:
        return denoiser_of(read_index(self.folder)) or DENOISERS[0]

    @cached_property
    def decoder(self) -> str | None:
        name = autoencoder_of(read_index(self.folder))
        return name and f"{name}_decoder"

    @cached_property
    def scale(self) -> int:
        return latent_scale(read_config(self.folder / self.decoder)) if self.decoder else 1

    @cached_property
    def takes(self) -> set[str]:
        return _takes(self.kind, read_config(denoiser_folder(self.folder)), self.controls)

    @cached_property
    def controls(self) -> int:
        return len(steering_folders(self.folder))

    @cached_property
    def shown(self) -> bool:
        return (self.folder / IMAGE_ENCODER).is_dir() and hasattr(check_index(self.folder)[1], "load_ip_adapter")

    def write(self, folder: Path, precision: str, sizes: Sequence[Latents], encoder: bool) -> None:
        """Copy all; an InputError if a size is not the one that the VAE is for."""
        own: Latents = (None, None)
        if self.decoder:
            spec = next(iter(inputs_of(read_graph(self.folder / self.decoder / GRAPH)).values()))
            sides = (*(d if isinstance(d, int) else None for d in spec.shape[2:4]), None, None)
            own = sides[0], sides[1]
        for size in sizes:
            fits = all(have in (None, need) for have, need in zip(own, size, strict=True))
            # A smaller one makes the only size by tiles.
            by_tiles = len(sizes) == 1 and all(
                have and need and have <= need for have, need in zip(own, size, strict=True)
            )
            if not fits and not by_tiles:
                raise InputError(
                    f"the VAE in {self.folder} is for latents of {own[0]}x{own[1]}, a denoiser for {size[0]}x{size[1]}:"
                    " name a model with --pipeline, whose VAE is exported for every size"
                )
        index = read_index(self.folder)
        index = index if self.safety_checker else without_safety_checker(index)
        check_carried(index, self.folder / INDEX)
        manifest.write_json(folder / INDEX, index)
        left = (*DENOISERS, *([] if encoder else ["vae_encoder"]))
        places = [place for name, row in components_of(index).items() for place in row.folders(name)]
        for place in dict.fromkeys((*places, *steering_folders(self.folder))):
            if place not in left and (self.folder / place).is_dir():
                shutil.copytree(self.folder / place, folder / place, ignore=_other_files)


def _takes(kind: Any, denoiser: Mapping[str, Any], controls: int) -> set[str]:
    """The arguments of the call of a pipeline's class; classes only if its denoiser knows some."""
    takes = set(inspect.signature(kind.__call__).parameters)
    classes = denoiser.get("num_class_embeds") or denoiser.get("num_embeds_ada_norm")  # of DiT
    takes = takes if classes else takes - {"class_labels"}
    return takes - {"image"} | {"control_image"} if controls and "control_image" not in takes else takes


def _other_files(folder: str, names: list[str]) -> list[str]:
    """What has no place in a bundle: caches, and the weights that the graph was exported from."""
    paths = [Path(folder, name) for name in names]
    outside = [path for path in paths if path.is_symlink() and not manifest.leads_inside(path, Path(folder))]
    return [path.name for path in paths if path in outside or not (path.is_dir() or allowed(path.name))]


class TorchRest:
    """A model in torch, whose components are exported for every size that is needed."""

    def __init__(
        self,
        model: str,
        safety_checker: bool = True,
        variant: str | None = None,
        rest: str | None = None,
        keep_fp32: Sequence[str] = (),
        steering: SteeringSettings | None = None,
    ) -> None:
        self.model, self.safety_checker, self.variant, self.rest = model, safety_checker, variant, rest
        self.keep_fp32, self.steering = list(keep_fp32), steering

    @cached_property
    def pipeline(self) -> Any:
        from slimdiff.denoising.schedulers import with_scheduler
        from slimdiff.loading.pipelines import load_pipeline

        pipeline = load_pipeline(self.model, "fp32", variant=self.variant, rest=self.rest, steering=self.steering)
        return with_scheduler(pipeline, use(Sampling(), usage_of(self.model)))

    @cached_property
    def kind(self) -> Any:
        return type(self.pipeline)

    @cached_property
    def denoiser(self) -> str:
        return denoiser_name(self.pipeline)

    @cached_property
    def decoder(self) -> str | None:
        name = autoencoder_of(self.pipeline.config)
        return name and f"{name}_decoder"

    @cached_property
    def scale(self) -> int:
        name = autoencoder_of(self.pipeline.config)
        return latent_scale(dict(getattr(self.pipeline, name).config)) if name else 1

    @cached_property
    def takes(self) -> set[str]:
        return _takes(self.kind, getattr(self.pipeline, self.denoiser).config, self.controls)

    @cached_property
    def controls(self) -> int:
        return len(nets_of(self.pipeline))

    @cached_property
    def shown(self) -> bool:
        return has_ip_adapter(self.pipeline)

    def write(self, folder: Path, precision: str, sizes: Sequence[Latents], encoder: bool) -> None:
        """Export all for the first size, and VAEs for the others."""
        from exporters.graphs.pipeline import example_call, export_pipeline
        from exporters.graphs.steering import folders_of
        from exporters.settings import ExportSettings

        about: Any = {"precision": precision, "safety_checker": self.safety_checker, "keep_fp32": self.keep_fp32}
        settings = ExportSettings(**about)
        steering = folders_of(self.pipeline)
        if steering and len(sizes) > 1:  # one ControlNet for all of them
            settings = settings.model_copy(update={"dynamic_size": True})
        vaes = (self.decoder, "vae_encoder")
        beside = [name for name in (*FOLDERS, *steering) if name not in vaes]
        for size in sizes[: None if self.decoder else 1]:
            pixels: Any = {k: n * self.scale for k, n in zip(("height", "width"), size, strict=True) if n is not None}
            place = folder / place_of(size, sizes)
            without = [*DENOISERS, *([] if encoder else ["vae_encoder"]), *([] if place == folder else beside)]
            call = example_call(self.pipeline, **pixels)
            export_pipeline(self.pipeline, place, settings, call=call, without=without)
            if place != folder:  # further sizes have a VAE alone
                for path in place.iterdir():
                    if path.name not in vaes:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

"""A whole exported pipeline as engines: which there are, for which shapes, and the folder that they make up."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.engine.build import EngineRequest, request_engine
from exporters.engine.check import runs_on
from exporters.engine.gpu import AskGpu, gpu_here
from exporters.engine.shapes import dims_of_inputs, fewest, profiles_of
from exporters.graphs.inputs import SAMPLES
from exporters.graphs.reading import read_graph
from exporters.layout import (
    CONFIGURED,
    DENOISERS,
    ENGINE_PIPELINE,
    EXACT,
    FOLDERS,
    GRAPH,
    INDEX,
    check_carried,
    components_of,
    denoiser_folder,
    latent_scale,
    parts_of,
    read_config,
    steering_folders,
)
from exporters.settings import EngineSettings, ShapeRange
from slimdiff.denoising.sizes import LATENT_UPSCALER
from slimdiff.errors import InputError
from slimdiff.schedule import FILE
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from exporters.engine.shapes import Dims
    from slimdiff import Plan


def request_pipeline(
    folder: Path | str,
    settings: EngineSettings | None = None,
    *,
    plan: Plan | None = None,
    branches: int = 1,
    gpu: AskGpu = gpu_here,
) -> dict[str, EngineRequest]:
    """Find out whether every graph of a pipeline can become an engine; builds nothing.

    Args:
        folder: that `export_pipeline` wrote.
        settings: the shapes are the UNet's, and the others' follow (`component_shapes`).
        plan: what the UNet's inner dims are held against.
        branches: of guidance, where a schedule has steps without; see `request_engine`.

    Returns:
        by folder, the UNet first: it takes the most memory, so that what does not fit shows at once.

    Raises:
        InputError: if the folder is no exported pipeline, or see `request_engine`.
        MissingPackageError: see `request_engine`.
    """
    folder, settings = Path(folder), settings or EngineSettings()
    names, index = _graphs(folder), manifest.read_json(folder / INDEX)
    enlarged = 2 if index.get("_class_name") == LATENT_UPSCALER else 1
    place = denoiser_folder(folder)
    unet = request_engine(place if parts_of(place) else place / GRAPH, settings, plan=plan, branches=branches, gpu=gpu)
    found = {place.name: unet}
    for name in names:
        file = folder / name / GRAPH
        encoder, dims = name == "vae_encoder", dims_of_inputs(read_graph(file))
        pixels = encoder or name.startswith("adapter")
        scale = latent_scale(read_config(folder / "vae_decoder")) if pixels else 1
        if name.startswith("controlnet"):
            shapes = controlnet_shapes(dims, unet.parts["shapes"])
        else:
            shapes = component_shapes(dims, unet.parts["shapes"], scale // (enlarged if encoder else 1))
        fitted = settings.model_copy(update={"batch": None, "shapes": {}, "profiles": [], **shapes})
        found[name] = request_engine(file, fitted, gpu=gpu)
    return found


def component_shapes(inputs: Dims, unet: Mapping[str, Any], scale: int = 1) -> dict[str, Any]:
    """The shapes of a text encoder or half a VAE that go with those of a UNet.

    A UNet of batch B makes B/2 images a call with guidance, and B without. In both cases diffusers decodes all images
    at once, but encodes what it is given: one prompt for all images or one for each, and the negative ones in a call of
    their own; one picture to start from for all images, one for each, or each by itself where every image has a
    generator. So these engines are for 1 to B, fastest at B/2 (at B, if it is odd: then there is no guidance): with a
    fixed batch they would refuse calls that every pipeline makes. What it costs is memory for B images.

    Args:
        scale: side of `sample` in units of the UNet's, where a graph leaves the size open: 1 for latents.

    Returns:
        `shapes` or `profiles` of `EngineSettings`; a profile per profile of the UNet that asks for another.

    Raises:
        InputError: if something else than batch, height and width is open, or these are no shapes of a UNet.
    """
    ranges: list[ShapeRange] = []
    for profile in profiles_of(unet):
        sample: Any = next((profile[name] for name in SAMPLES if name in profile), {"min": []})
        if len(sample["min"]) not in (3, 4):  # of [B, tokens, C], no size is known
            raise InputError("what is to be an engine in the place of the denoiser has no input sample [B, C, H, W]")
        most, best = sample["max"][0], sample["opt"][0]
        axes = (2, 3) if len(sample["min"]) == 4 else ()
        batches = {"min": 1, "opt": best // 2 if best % 2 == 0 else best, "max": most}
        ends: dict[str, Any] = {
            end: {
                n: _shape(n, dims, [batch, *(scale * sample[end][axis] for axis in axes)]) for n, dims in inputs.items()
            }
            for end, batch in batches.items()
        }
        shape_range = ShapeRange(**ends)
        if not any(_covers(other, shape_range) for other in ranges):
            ranges.append(shape_range)
    return fewest(ranges)


def _covers(one: ShapeRange, other: ShapeRange) -> bool:
    """Whether a profile takes all that another takes, and is fastest at the same."""
    below = all(a <= b for name, low in one.min.items() for a, b in zip(low, other.min[name], strict=True))
    above = all(a >= b for name, high in one.max.items() for a, b in zip(high, other.max[name], strict=True))
    return one.opt == other.opt and below and above


def controlnet_shapes(inputs: Dims, unet: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of a ControlNet that go with those of its UNet: the same, and from one sample up.

    In guess mode it is asked for the half that has a prompt.

    Returns:
        `profiles` of `EngineSettings`.
    """
    profiles = []
    for profile in profiles_of(unet):
        ends: dict[str, Any] = {}
        for end in ("min", "opt", "max"):
            _, *rest = profile["sample"][end]
            sizes = [1 if end == "min" else profile["sample"][end][0], *rest]
            dims = zip(inputs["sample"], sizes, strict=True)  # an inpainting UNet's sample has more channels
            ends[end] = {"sample": tuple(own if isinstance(own, int) else size for own, size in dims)}
        profiles.append(ShapeRange(**ends))
    return {"profiles": profiles}


def _shape(name: str, dims: Any, sizes: list[int]) -> tuple[int, ...]:
    """`sizes` are those of the batch and, if known, of height and width of images `[B, C, H, W]`."""
    places = dict(zip((0, 2, 3) if len(dims) == 4 else (0,), sizes, strict=False))
    other = [dim for axis, dim in enumerate(dims) if isinstance(dim, str) and axis not in places]
    if other:
        raise InputError(f"input {name} leaves {', '.join(other)} open: export with `slimdiff export`, which fixes it")
    return tuple(places[axis] if isinstance(dim, str) else dim for axis, dim in enumerate(dims))


def _graphs(folder: Path) -> list[str]:
    """The folders with graphs besides the UNet's."""
    place = denoiser_folder(folder)
    if not (folder / INDEX).is_file() or not ((place / GRAPH).is_file() or parts_of(place)):
        raise InputError(
            f"{folder} is no exported pipeline (it has no {INDEX} beside unet/{GRAPH}): make one with `slimdiff export`"
        )
    index = manifest.read_json(folder / INDEX)
    entries = index if isinstance(index, dict) else {}
    check_carried(entries, folder / INDEX)
    rows = components_of(entries)
    if place.name not in rows:
        raise InputError(f"{folder / INDEX} names no {place.name}: export the pipeline again, whole")
    graphs = [graph for name, row in rows.items() if row.graphs for graph in row.folders(name)]
    lacking = [
        name for name in graphs if name not in (place.name, "vae_encoder") and not (folder / name / GRAPH).is_file()
    ]
    if lacking:
        raise InputError(f"{folder} has no {lacking[0]}/{GRAPH}, which its pipeline needs: export it again, whole")
    graphs = list(dict.fromkeys((*graphs, *steering_folders(folder))))
    return [n for n in graphs if n not in (place.name, *EXACT) and (folder / n / GRAPH).is_file()]


def mark_unfinished(out: Path) -> None:
    """Take away what makes a folder a pipeline: from the first engine replaced until `finish_pipeline`, it is none."""
    for name in (manifest.MANIFEST, INDEX):
        (out / name).unlink(missing_ok=True)


def finish_pipeline(source: Path, out: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the rest of a pipeline beside its engines, its safety checker as a graph, and describe it all in a manifest.

    Args:
        out: where they lie, each in the folder of its name; what is there of an earlier pipeline, and is no part of
            this one, goes.
        reports: what `engine.json` has, by folder.
    """
    mark_unfinished(out)
    copied = [name for name in (*CONFIGURED, *EXACT) if (source / name).is_dir()]
    for name in (*FOLDERS, *steering_folders(out)):
        if name not in (*reports, *copied):
            shutil.rmtree(out / name, ignore_errors=True)
    for name in copied:
        with manifest.replacing(out / name) as temporary:
            shutil.copytree(source / name, temporary, dirs_exist_ok=True)
    made_from: dict[str, Any] = {"engines": {name: report["key"] for name, report in reports.items()}}
    if (source / manifest.MANIFEST).is_file():
        made_from |= {"onnx": manifest.read_manifest(source)["made_from"]}
    shapes = {"shapes": {name: report["parts"]["shapes"] for name, report in reports.items()}}
    (out / FILE).unlink(missing_ok=True)
    for name in (name for name in (FILE, INDEX) if (source / name).is_file()):
        with manifest.replacing(out / name, is_file=True) as file:
            shutil.copyfile(source / name, file)
    denoiser = next(reports[name] for name in DENOISERS if name in reports)
    manifest.write_manifest(out, ENGINE_PIPELINE, made_from, runs_on(denoiser) | shapes)

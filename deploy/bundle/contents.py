"""Choosing what a bundle for a machine holds, and writing it."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import slimdiff
from deploy.artifacts.files import license_files
from deploy.artifacts.usage import SAMPLING, usage_of
from deploy.bundle.description import KIND, TRITON, Denoiser, Description, Model, describe
from deploy.bundle.rest import ExportedRest, TorchRest, place_of
from deploy.bundle.sources import Candidate, Selection, Source
from deploy.triton import check_served, write_repository
from exporters.engine.check import REPORT, runs_on
from exporters.engine.scheduled import find_shallow
from exporters.graphs.int8 import processors_for
from exporters.graphs.reading import read_graph
from exporters.layout import GRAPH, engine_folders
from exporters.registry import names, runtime_of
from slimdiff.errors import InputError
from slimdiff.loading.naming import read_index
from slimdiff.schedule import FILE
from slimdiff.storage import manifest as manifests

_GRAPHS_ON_SERVERS = {
    "fp32": ["onnxruntime-cuda", "openvino-fp32", "onnxruntime"],
    "fp16": ["onnxruntime-cuda", "openvino", "onnxruntime"],
    "int8": ["openvino", "onnxruntime"],
}
_GRAPHS_ON_EDGES = ["openvino"]  # the fastest on CPUs: `python -m benchmarks.runtimes`
# What a machine reads of an engine's report; the rest of it is about how it was built.
_READ_OF_ENGINES = ("backend", "version", "targets", "precision", "bytes", "inputs", "outputs", "key", "parts")


def choose(source: Source, selection: Selection) -> tuple[list[Candidate], list[Candidate]]:
    """The denoisers that go into the bundle, and those of the source that do not.

    A server gets all that fit, an edge the first: a graph, which runs anywhere, unless an engine was asked for.

    Raises:
        InputError: if none fits, saying what there is.
    """
    fitting = [c for c in source.candidates if _fits(c, selection)]
    if selection.target == "edge" and not selection.capabilities and selection.runtime is None:
        fitting = sorted(fitting, key=lambda c: c.is_engine)
    if not fitting:
        there = "; ".join(map(str, source.candidates))
        raise InputError(f"none of what there is fits what was asked for; there is: {there}")
    taken = fitting[:1] if selection.target == "edge" else fitting
    return taken, [c for c in source.candidates if c not in taken]


def _fits(candidate: Candidate, selection: Selection) -> bool:
    runs_in = (candidate.backend,) if candidate.is_engine else names("graph")
    if selection.runtime not in (None, *runs_in):
        return False
    # A graph is for no GPU. An engine may be for more than are asked for; that is one file, and it cannot be cut.
    on_gpus = selection.capabilities and (candidate.is_engine or selection.target == "edge")
    if on_gpus and set(selection.capabilities).isdisjoint(candidate.capabilities):
        return False
    if selection.precisions and candidate.precision not in selection.precisions:
        return False
    own = candidate.batch, candidate.height, candidate.width
    return not selection.shapes or any(
        all(n in (None, asked) for n, asked in zip(own, shape, strict=True)) for shape in selection.shapes
    )


def write_bundle(
    source: Source, taken: Sequence[Candidate], folder: Path, selection: Selection, *, triton: bool = False
) -> Description:
    """Write a bundle into an empty folder.

    Args:
        triton: write a Triton repository of the bundle's own pipeline, too.

    Returns:
        what the manifest says of it.

    Raises:
        InputError: if the source's parts do not fit together.
    """
    if triton:
        check_served(source.rest.kind.__name__, "the source")
    edge = selection.target == "edge"
    sizes = list(dict.fromkeys(c.latents for c in taken))
    odd = next((c for c in taken if c.precision not in _GRAPHS_ON_SERVERS), None)
    if odd is not None:
        raise InputError(
            f"{odd.name} is in none of {', '.join(_GRAPHS_ON_SERVERS)}: export it in one of these to bundle it"
        )
    for candidate in taken:
        if source.schedule is not None and candidate.place is not None:
            find_shallow(candidate.place, source.schedule, engine=candidate.is_engine)
    denoiser = source.rest.denoiser
    denoisers: list[Denoiser] = []
    for candidate in taken:
        place = f"engines/{candidate.name}" if candidate.is_engine else denoiser
        if place in [d.folder for d in denoisers]:
            place = f"graphs/{candidate.name}"
        candidate.write(folder / place)
        if edge:
            _make_lean(folder / place)
        runtimes = _runtimes(candidate, selection)
        vae = place_of(candidate.latents, sizes) if source.rest.decoder else None
        about = candidate.model_dump(include=set(Model.model_fields))
        denoisers.append(Denoiser(folder=place, vae=vae, runtimes=runtimes, **about))
    if source.schedule is not None:
        source.schedule.save(folder / FILE)
    source.rest.write(folder, taken[0].precision, sizes, not edge or "image" in source.rest.takes)
    python = str(importlib.metadata.metadata("slimdiff")["Requires-Python"])
    packages = _packages(denoisers) | ({"invisible-watermark": ""} if read_index(folder).get("add_watermarker") else {})
    processors = processors_for(*(read_graph(file) for file in folder.rglob(GRAPH)))
    about = {"packages": packages, "processors": processors, "denoisers": denoisers}
    description = Description(target=selection.target, python=python, **about)
    _write_licenses(folder / "licenses", source.folders)
    (folder / "README.md").write_text(_readme(description, source.rest), encoding="utf-8")
    used = usage_of(*map(str, source.folders))
    if triton:
        write_repository(folder, folder / TRITON, usage=used)
    made_from = source.made_from
    if edge:  # what ties it to its source, without the settings that made that
        made_from = {k: v for k, v in made_from.items() if k in ("manifest", "build", "model") and isinstance(v, str)}
    made_from = {"source": source.kind, **({SAMPLING: used} if used else {}), **made_from}
    manifest = manifests.write_manifest(folder, KIND, made_from, description.model_dump())
    return describe(manifest, str(folder / manifests.MANIFEST))  # what would be refused later is refused now


def _runtimes(candidate: Candidate, selection: Selection) -> list[Any]:
    if candidate.is_engine:
        return [candidate.backend]
    if selection.runtime is not None:
        return [selection.runtime]
    return _GRAPHS_ON_EDGES if selection.target == "edge" else _GRAPHS_ON_SERVERS[candidate.precision]


def _make_lean(folder: Path) -> None:
    """Take out what only a denoiser's builder reads: the plan in its configuration, an engine's layers."""
    config = manifests.read_json(folder / "config.json")
    manifests.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "slim_plan"})
    for place in (*engine_folders(folder), folder):  # the manifest around others lists theirs
        if (place / REPORT).is_file():
            report = manifests.read_json(place / REPORT)
            manifests.write_json(place / REPORT, {k: report[k] for k in _READ_OF_ENGINES if k in report})
            manifests.write_manifest(place, "engine", {"key": report["key"]}, runs_on(report))


def _packages(denoisers: Sequence[Denoiser]) -> dict[str, str]:
    """What the machine needs: slimdiff with an extra for every runtime, and an engine's runtime in its very version."""
    extras = {runtime_of(runtime).extra for d in denoisers for runtime in d.runtimes}
    if any(d.is_engine for d in denoisers):
        extras.add("onnx")  # in which text encoders and VAE are
    if "onnx" in extras:
        extras.discard("gpu")  # they hold one another's packages: whoever has a GPU takes `gpu` instead
    version = importlib.metadata.version("slimdiff")
    found = {f"slimdiff[{','.join(sorted(extras))}]": f">={version}"}
    for denoiser in denoisers:
        if denoiser.is_engine and denoiser.version:
            found[runtime_of(denoiser.runtimes[0]).packages[0]] = f"=={denoiser.version}"
    return found


def material_flags(rest: ExportedRest | TorchRest, text: str) -> str:
    """The flags of `generate` for what a pipeline makes an image from."""
    flags = {
        "image": ["--image photo.png"],
        "mask_image": ["--mask mask.png"],
        "control_image": ["--control-image edges.png"] * rest.controls,
        "class_labels": ["--class 0"],
        "ip_adapter_image": ["--ip-adapter-image style.png"] * rest.shown,
        "prompt": [f"--prompt {text}"],
    }
    return " ".join(flag for name, several in flags.items() if name in rest.takes for flag in several)


def _readme(description: Description, rest: ExportedRest | TorchRest) -> str:
    """What is in the bundle, what it needs, and the command that runs it; our tests run that command."""
    templates = Environment(
        loader=PackageLoader("deploy.bundle"), trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    packages = [f"'{name}{version}'" for name, version in description.packages.items()]
    runtimes = dict.fromkeys(runtime for d in description.denoisers for runtime in d.runtimes)
    return templates.get_template("README.md.j2").render(
        bundle=description,
        packages=packages,
        runtimes=runtimes,
        takes=rest.takes,
        controls=rest.controls,
        shown=rest.shown,
        material=material_flags(rest, '"a lighthouse at dusk"'),
    )


def _write_licenses(folder: Path, sources: Sequence[Path]) -> None:
    """Our licence, and what of that kind lies in the folders of the sources."""
    folder.mkdir()
    beside = Path(slimdiff.__file__).parents[1] / "LICENSE"
    installed = [str(f.locate()) for f in importlib.metadata.files("slimdiff") or [] if f.name == "LICENSE"]
    own = next((file for file in [beside, *map(Path, installed)] if file.is_file()), None)
    if own is None:
        raise InputError("slimdiff's own LICENSE is missing from its installation: install it again")
    shutil.copyfile(own, folder / "slimdiff-LICENSE.txt")
    for file in [f for s in sources for f in license_files(s)]:
        shutil.copyfile(file, folder / f"model-{file.stem}.txt")

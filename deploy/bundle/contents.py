"""What goes into a bundle for a machine, and writing it."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import slimdiff
from deploy.artifacts.files import license_files
from deploy.bundle.description import KIND, Denoiser, Description, describe
from deploy.bundle.readme import write_readme
from deploy.bundle.rest import place_of
from deploy.bundle.sources import Candidate, Source
from exporters.engine.check import ENGINE, REPORT, runs_on
from exporters.registry import names, runtime_of
from slimdiff.errors import InputError
from slimdiff.storage import manifest as manifests

Target = Literal["edge", "server"]
_GRAPHS_ON_SERVERS = {
    "fp32": ["onnxruntime-cuda", "openvino-fp32", "onnxruntime"],
    "fp16": ["onnxruntime-cuda", "openvino", "onnxruntime"],
}
_GRAPHS_ON_EDGES = ["openvino"]  # the fastest on CPUs: `python -m benchmarks.runtimes`
# What a machine reads of an engine's report; the rest of it is about how it was built.
_READ_OF_ENGINES = ("backend", "version", "targets", "precision", "bytes", "inputs", "outputs", "key", "parts")


@dataclass(frozen=True)
class Wanted:
    """Which of the denoisers; what is empty leaves the choice open."""

    shapes: Sequence[tuple[int, int, int]] = ()
    """Samples in one call, height and width in pixels."""
    precisions: Sequence[str] = ()
    capabilities: Sequence[str] = ()
    """Compute capabilities of engines; graphs go along on a server, and an edge gets none."""
    runtime: str | None = None


def choose(source: Source, target: Target, wanted: Wanted) -> tuple[list[Candidate], list[Candidate]]:
    """The denoisers that go into the bundle, and those of the source that do not.

    A server gets all that fit, an edge the first: a graph, which runs anywhere, unless an engine was asked for.

    Raises:
        InputError: if none fits, telling what there is.
    """
    fitting = [c for c in source.candidates if _fits(c, source.scale, wanted, target)]
    if target == "edge" and not wanted.capabilities and wanted.runtime is None:
        fitting = sorted(fitting, key=lambda c: c.is_engine)
    if not fitting:
        there = "; ".join(_told(c, source.scale) for c in source.candidates)
        raise InputError(f"none of what there is fits what was asked for; there is: {there}")
    taken = fitting[:1] if target == "edge" else fitting
    return taken, [c for c in source.candidates if c not in taken]


def _fits(candidate: Candidate, scale: int, wanted: Wanted, target: Target) -> bool:
    if wanted.runtime is not None:
        runs_in = [candidate.backend] if candidate.is_engine else names("graph")
        if wanted.runtime not in runs_in:
            return False
    if wanted.capabilities:
        # An engine may be for more GPUs than are asked for; that is one file, and it cannot be cut.
        if candidate.is_engine and not set(wanted.capabilities) & set(candidate.capabilities):
            return False
        if not candidate.is_engine and target == "edge":
            return False
    if wanted.precisions and candidate.precision not in wanted.precisions:
        return False
    have = _pixels(candidate, scale)
    return not wanted.shapes or any(
        all(mine in (None, asked) for mine, asked in zip(have, shape, strict=True)) for shape in wanted.shapes
    )


def _pixels(candidate: Candidate, scale: int) -> tuple[int | None, int | None, int | None]:
    height, width = (None if n is None else n * scale for n in candidate.latents)
    return candidate.batch, height, width


def _told(candidate: Candidate, scale: int) -> str:
    shape = "x".join("*" if n is None else str(n) for n in _pixels(candidate, scale))
    where = f", an engine of {candidate.backend} for {' '.join(candidate.capabilities)}" if candidate.is_engine else ""
    return f"{candidate.name}, {candidate.precision}, {shape}{where}"


def write_bundle(
    source: Source,
    folder: Path,
    target: Target,
    wanted: Wanted,
    *,
    more: Sequence[Callable[[Path], None]] = (),
    progress: str | None = None,
) -> Description:
    """Write a bundle into an empty folder.

    Args:
        source: from `open_source`.
        folder: that is there.
        target: what kind of machine it is for.
        wanted: which of the source's denoisers.
        more: write further things into the folder, once the pipeline is in it and before the manifest is made.
        progress: what to call exports on stderr; None: say nothing.

    Returns:
        what the manifest tells of it.

    Raises:
        InputError: if nothing of the source fits, or its parts do not fit together.
    """
    taken, left = choose(source, target, wanted)
    sizes = list(dict.fromkeys(c.latents for c in taken))
    odd = next((c for c in taken if c.precision not in _GRAPHS_ON_SERVERS), None)
    if odd is not None:
        raise InputError(f"{odd.name} is neither fp32 nor fp16: export it in one of these to bundle it")
    denoisers: list[Denoiser] = []
    for candidate in taken:
        place = _place(candidate, [d.folder for d in denoisers])
        candidate.write(folder / place)
        if target == "edge":
            make_lean(folder / place)
        batch, height, width = _pixels(candidate, source.scale)
        denoisers.append(
            Denoiser(
                name=candidate.name,
                folder=place,
                vae=place_of(candidate.latents, sizes),
                runtimes=_runtimes(candidate, target, wanted),
                precision=candidate.precision,  # type: ignore[arg-type]
                batch=batch,
                height=height,
                width=width,
                capabilities=list(candidate.capabilities),
                version=candidate.version,
            )
        )
    source.rest.write(folder, taken[0].precision, sizes, target == "server", progress)
    description = Description(target=target, python=_python(), packages=_packages(denoisers), denoisers=denoisers)
    write_licenses(folder / "licenses", source.folders)
    write_readme(folder / "README.md", description)
    for step in more:
        step(folder)
    made_from = {"source": source.kind, **source.made_from} if target == "server" else _hashes(source)
    manifest = manifests.write_manifest(folder, KIND, made_from, description.model_dump())
    return describe(manifest, str(folder / manifests.MANIFEST))  # what would be refused later is refused now


def _place(candidate: Candidate, taken: list[str]) -> str:
    if candidate.is_engine:
        return f"engines/{candidate.name}"
    return f"graphs/{candidate.name}" if "unet" in taken else "unet"


def _runtimes(candidate: Candidate, target: Target, wanted: Wanted) -> list[Any]:
    if candidate.is_engine:
        return [candidate.backend]
    if wanted.runtime is not None:
        return [wanted.runtime]
    return list(_GRAPHS_ON_EDGES if target == "edge" else _GRAPHS_ON_SERVERS[candidate.precision])


def make_lean(folder: Path) -> None:
    """Take out what only a denoiser's builder reads: the plan in its configuration, an engine's layers."""
    config = manifests.read_json(folder / "config.json")
    manifests.write_json(folder / "config.json", {k: v for k, v in config.items() if k != "slim_plan"})
    if (folder / ENGINE).is_file():
        report = manifests.read_json(folder / REPORT)
        manifests.write_json(folder / REPORT, {k: report[k] for k in _READ_OF_ENGINES if k in report})
        manifests.write_manifest(folder, "engine", {"key": report["key"]}, runs_on(report))


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


def _python() -> str:
    return str(importlib.metadata.metadata("slimdiff")["Requires-Python"])


def _hashes(source: Source) -> dict[str, Any]:
    """What ties a bundle to its source, without the settings that made that."""
    kept = {k: v for k, v in source.made_from.items() if k in ("manifest", "build", "model") and isinstance(v, str)}
    return {"source": source.kind, **kept}


def write_licenses(folder: Path, sources: Sequence[Path]) -> None:
    """Our licence, and what of that kind lies in the folders of the sources.

    Raises:
        InputError: if ours is not there.
    """
    folder.mkdir()
    shutil.copyfile(_own_license(), folder / "slimdiff-LICENSE.txt")
    for file in [f for s in sources for f in license_files(s)]:
        shutil.copyfile(file, folder / f"model-{file.stem}.txt")


def _own_license() -> Path:
    beside = Path(slimdiff.__file__).parents[1] / "LICENSE"
    if beside.is_file():
        return beside
    for file in importlib.metadata.files("slimdiff") or []:
        if file.name == "LICENSE":
            return Path(str(file.locate()))
    raise InputError("slimdiff's own LICENSE is missing from its installation: install it again")

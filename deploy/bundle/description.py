"""What a bundle's manifest says of it; nothing of a bundle is used before it is found to be whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporters.layout import AUTOENCODERS, ENGINE, GRAPH, STEP
from exporters.settings import SessionRuntime
from slimdiff.errors import InputError
from slimdiff.storage import manifest as manifests

KIND = "bundle"
TRITON = "triton"
"""The folder of a bundle that a Triton server reads and nothing here opens, so that it may hold files of any kind."""
ENDINGS = (".json", ".txt", ".md", ".onnx", ".data", ".engine", ".model")
"""Of the files in a bundle; none of these is ever run. `.model` is a tokenizer's."""


class Model(BaseModel):
    """A graph or an engine of the UNet, wherever it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    precision: str
    batch: int | None = Field(ge=1)
    """Samples in one call, with guidance two per image; None: any number."""
    height: int | None = Field(ge=1)
    """Of the images, pixels; None: any."""
    width: int | None = Field(ge=1)
    """Of the images, pixels; None: any."""
    capabilities: list[str]
    """Compute capabilities that an engine is for, e.g. `sm89`; empty for a graph."""
    version: str | None
    """Of the runtime that an engine was built with, and which alone opens it; None for a graph."""

    @property
    def is_engine(self) -> bool:
        return bool(self.capabilities)

    @property
    def shape(self) -> str:
        """`2x512x512`: samples, height and width, `*` where any will do."""
        return "x".join("*" if n is None else str(n) for n in (self.batch, self.height, self.width))


class Denoiser(Model):
    """One of a bundle."""

    folder: str
    """Below the bundle, with `model.onnx` or `model.engine`, or a folder for each part of it, and `config.json`."""
    vae: str | None
    """Below the bundle (or `.`), with a `vae_decoder` (or `vqvae_decoder`) for images of this size. None where the
    images themselves are denoised."""
    runtimes: list[SessionRuntime] = Field(min_length=1)
    """What it is meant to run in, best first."""
    precision: Literal["fp32", "fp16", "int8"]

    def __str__(self) -> str:
        where = f" for {', '.join(self.capabilities)}" if self.is_engine else ""
        return f"{self.name} ({self.precision}, {self.shape}{where})"


class Description(BaseModel):
    """A bundle's `runs_on`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: Literal["edge", "server"]
    python: str
    packages: dict[str, str]
    """What must be installed, with the versions that will do."""
    processors: str | None = None
    """That all its graphs are right on in every runtime, for people; opening a graph checks it. None: not looked at."""
    denoisers: list[Denoiser] = Field(min_length=1)
    """The first is the one that is taken where nothing else decides."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what its manifest says."""

    folder: Path
    manifest: dict[str, Any]
    description: Description


def read_bundle(folder: Path) -> Bundle:
    """Open a bundle's manifest and hold every file against it.

    Raises:
        InputError: if the folder is no bundle, holds another file than the manifest says, a link or a kind of file that
            no bundle has, or the manifest describes what is not in it.
    """
    manifest = manifests.read_manifest(folder)
    description = describe(manifest, str(folder / manifests.MANIFEST))
    manifests.verify_manifest(folder, exact=True)
    return Bundle(folder, manifest, description)


def describe(manifest: dict[str, Any], where: str) -> Description:
    """What a manifest says of a bundle, checked against its own list of files.

    Raises:
        InputError: see `read_bundle`.
    """
    if manifest["kind"] != KIND:
        raise InputError(f"{where} is that of {manifest['kind']!r}, not of a bundle: make one with `slimdiff bundle`")
    try:
        description = Description.model_validate(manifest["runs_on"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: runs_on.{place}: {first['msg'].lower()}") from error
    for name in manifest["files"]:
        if not allowed(name):
            raise InputError(f"{where} lists {name}, and no bundle has files of that kind: refused")
    for denoiser in description.denoisers:
        model = ENGINE if denoiser.is_engine else GRAPH
        vae = "" if denoiser.vae == "." else f"{denoiser.vae}/"
        decoders = [f"{vae}{name}_decoder/model.onnx" for name in AUTOENCODERS] if denoiser.vae else []
        models = [f"{denoiser.folder}/{place}{model}" for place in ("", f"{STEP}/")]  # whole, or in parts
        needed = [models, [f"{denoiser.folder}/config.json"], *([decoders] if decoders else [])]
        for names in needed:
            if not set(names) & manifest["files"].keys():
                raise InputError(f"{where} has no {names[0]}, which its denoiser {denoiser.name!r} needs")
    return description


def allowed(name: str) -> bool:
    """Whether a file of that name may be in a bundle."""
    path = PurePosixPath(name)
    return path.suffix in ENDINGS or (path.parts[0] == TRITON and len(path.parts) > 1)

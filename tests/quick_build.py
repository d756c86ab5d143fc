"""A build that takes milliseconds, and other small writers: for tests that kill them at every file operation."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

from bundles import DESCRIPTION

from deploy.build.stages import Stage, run_stages
from deploy.bundle.archive import pack, unpack
from deploy.bundle.description import KIND
from deploy.history import results
from slimdiff.storage import atomic, manifest
from slimdiff.storage.lock import locked


def build(folder: str, text: str, wait_for: str = "") -> None:
    """Two stages that depend on each other and one that does not; `text` decides what the first two hold."""
    out = Path(folder)

    def first(_: object, into: Path) -> None:
        (into / "deep").mkdir()
        (into / "deep" / "text.txt").write_text(text * 100)
        while wait_for and not Path(wait_for).exists():
            time.sleep(0.005)

    def second(_: object, into: Path) -> None:
        (into / "copy.txt").write_text((out / "first" / "deep" / "text.txt").read_text())

    def aside(_: object, into: Path) -> None:
        manifest.write_json(into / "aside.json", [1])

    stages = [
        Stage("first", first, settings=lambda _: text),
        Stage("second", second, needs=("first",)),
        Stage("aside", aside),
    ]
    with locked(out):
        done = [vars(stage) for stage in run_stages(SimpleNamespace(folder=out), stages)]
        manifest.write_json(out / "build.json", {"stages": [{k: d[k] for k in ("name", "key")} for d in done]})


def replace_folder(path: str, text: str, wait_for: str = "") -> None:
    """A folder with two files."""
    with atomic.replacing(Path(path)) as temporary:
        for name in ("a.txt", "b.txt"):
            (temporary / name).write_text(text)
        while wait_for and not Path(wait_for).exists():
            time.sleep(0.005)


def replace_folder_in_two_renames(path: str, text: str) -> None:
    """The same, as it is done where two names cannot be swapped."""
    with atomic._workplace(Path(path)) as workplace:
        temporary = workplace / Path(path).name
        temporary.mkdir()
        for name in ("a.txt", "b.txt"):
            (temporary / name).write_text(text)
        atomic._move_aside(temporary, Path(path))


def write_bundle(folder: str, text: str) -> None:
    """A bundle by its manifest; its graphs are none."""
    with manifest.replacing(Path(folder)) as temporary:
        for name in ("unet/model.onnx", "unet/config.json", "vae_decoder/model.onnx"):
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text * 1000)
        manifest.write_manifest(temporary, KIND, {}, DESCRIPTION.model_dump())


def pack_bundle(folder: str, file: str) -> None:
    pack(Path(folder), Path(file))


def unpack_bundle(file: str, folder: str) -> None:
    unpack(Path(file), Path(folder))


def append(file: str, writer: int, count: int, size: int = 3000) -> None:
    """Append to a history; says after each line that it is there."""
    for index in range(count):
        results.append(Path(file), {"writer": writer, "index": index, "filler": "x" * size})
        print(writer, index, flush=True)

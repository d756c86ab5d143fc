"""Files that commands are given, and places where they write: whole or not at all, and only over what is ours.

Every check is made before the long work, and raises an InputError that says what is wrong and what would be right.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

from deploy.artifacts import build_folder
from deploy.artifacts.kinds import graph_of, kind_of, not_runnable
from deploy.cli import disk_errors
from exporters.layout import CONFIGURED, ENGINE_PIPELINE, INDEX
from slimdiff import embedded
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_component, find_model, places_of
from slimdiff.storage import manifest
from slimdiff.storage.atomic import try_place

READ = (
    *("model", "artifact", "source", "onnx", "base", "candidate", "dense", "slim", "onto", "pipeline"),
    *(
        "recipe",
        "file",
        "prompts",
        "input_images",
        "input_masks",
        "control_images",
        "statistics",
        "plan",
        "schedule",
        "base_schedule",
        "merge",
        "reference",
    ),
    *("SteeringSettings.controlnet", "SteeringSettings.adapter", "ip_adapter_image"),
)
"""Arguments, by their names in the namespace, that may be places to read."""
WRITTEN = ("out", "history", "junit", "markdown", "plot", "save_images")
"""And those that are places to write."""

_NO_FILES = ("general", "embedded")  # sources of prompts
_KINDS = {
    "slim-model": "a slim model",
    "onnx": "an ONNX folder",
    "engine": "an engine",
    "engines": "a set of engines",
    ENGINE_PIPELINE: "a pipeline of engines",
    "bundle": "a bundle",
    "build": "a build",
    "sweep": "a sweep",
    "images": "a set of images",
}
_BESIDE_PARTS = {
    "build": (build_folder.BUILD, build_folder.REPORT),
    "sweep": ("sweep.json", "sweep.html"),
    "engines": (),
    ENGINE_PIPELINE: (INDEX, *CONFIGURED),
}
"""Kinds that grow part by part, each with a manifest of its own; with what lies beside the parts until all are there.
The others appear as a whole."""
_BEGINNINGS = {
    "PNG image": rb"\x89PNG\r\n",
    "SVG drawing": rb"\s*<(\?xml|!--|svg)",
    "JUnit file": rb"\s*<(\?xml|testsuite)",
    "history": rb"\s*(\{|$)",
    "LoRA file": rb"(?s:.{8})\{",
    "statistics file": rb"(?s:.{8})\{",
    "schedule": rb"\s*\{",
    "archive of a bundle": rb"\x28\xb5\x2f\xfd",
    "text file": rb"[^\0]*\Z",
}
"""How the files begin that commands write."""


def check_places(args: argparse.Namespace) -> None:
    """Refuse a command that would write over what it reads; see `check_apart`."""
    values = [value for name in READ if (value := getattr(args, name, None)) is not None]
    read = [str(path) for value in values for path in (value if isinstance(value, list) else [value])]
    written = {
        f"--{name.replace('_', '-')}": Path(path) for name in WRITTEN if (path := getattr(args, name, None)) is not None
    }
    check_apart(written, read)


def check_apart(written: Mapping[str, Path], read: Iterable[str]) -> None:
    """Refuse places to write that are, hold or lie in what is read, by whatever path or link, and one place for two.

    Args:
        written: places by the flags that name them.
        read: files, folders, and names that are neither; a component folder is read with its pipeline.
    """
    for (flag, path), (other, second) in combinations(written.items(), 2):
        if _same(Path(os.path.realpath(path)), Path(os.path.realpath(second))):
            raise InputError(f"{flag} and {other} are both {path}: give each a place of its own")
    for name in dict.fromkeys(str(place) for one in read for place in places_of(one)):
        source = embedded.path() if name == "demo" else Path(name)
        if name in _NO_FILES or not os.path.lexists(source):
            continue
        for flag, path in written.items():
            place = Path(os.path.realpath(path))
            for reached in _reached(source):
                how = "is" if _same(place, reached) else "holds" if _within(reached, place) else ""
                how = how or ("lies in" if _within(place, reached) else "")
                if how:
                    raise InputError(f"{flag} {path} {how} {source}, which is read: name another place")


def _reached(source: Path) -> Iterator[Path]:
    """A file or folder, and what the links in it lead to, by real paths."""
    yield Path(os.path.realpath(source.parent)) / source.name
    yield Path(os.path.realpath(source))
    for folder, folders, names in os.walk(source):
        for name in (*folders, *names):
            if os.path.islink(entry := os.path.join(folder, name)):
                yield Path(os.path.realpath(entry))


def _same(one: Path, other: Path) -> bool:
    """Also of two spellings, where the file system does not tell capitals."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return False


def _within(inner: Path, outer: Path) -> bool:
    return any(_same(place, outer) for place in inner.parents)


def check_folder(folder: Path, kind: str, flag: str = "--out") -> None:
    """Refuse a place to write an artifact of a kind into that is a file, cannot be written, or holds anything else.

    Another kind of ours is something else, and so is a file of the user's own that would be taken away.
    """
    check_writable(folder, flag)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag} {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    there = _kind_there(folder, flag)
    if there not in (None, kind):
        what = _KINDS[kind]
        raise InputError(
            f"{flag} {folder} is of the kind {there!r}, and {what} would take its place: name another folder"
        )
    if there in ("build", "sweep"):  # what users put beside the stages stays there
        return
    beside = _BESIDE_PARTS.get(kind, ())
    strange = (f.relative_to(folder) for f in manifest.strangers(folder))
    first = next((file for file in strange if file.parts[0] not in beside), None)
    if first is None and (there or kind in _BESIDE_PARTS):
        return
    if there is None:
        raise InputError(
            f"{flag} {folder} holds files that slimdiff did not write ({first}): name another folder, or empty it"
        )
    raise InputError(f"{flag} {folder} holds {first}, which slimdiff did not write: move it, or name another folder")


def _kind_there(folder: Path, flag: str) -> str | None:
    """The kind of a folder, by its manifest or by what a build ends with; None if it has neither."""
    if (folder / manifest.MANIFEST).is_file():
        try:
            content = manifest.read_manifest(folder)
        except InputError as error:
            raise InputError(
                f"{flag} {folder} cannot be replaced, for nobody knows whose files are in it: {error}; "
                "name another folder, or remove it"
            ) from error
        return "stage of a build" if "stage" in content["made_from"] else content["kind"]
    if (folder / build_folder.BUILD).is_file():
        whole = manifest.read_json(folder / build_folder.BUILD)
        return "build" if isinstance(whole, dict) and {"stages", "verdict"} <= whole.keys() else None
    return None


def check_writable(path: Path, flag: str = "--out") -> None:
    """Refuse a place, named by a flag, that cannot be written; if it is not there, look where it would be made."""
    whole = path.absolute()
    place = next(p for p in (whole, *whole.parents) if p.exists())
    if place != whole and not place.is_dir():
        raise InputError(f"{flag} {path} leads through {place}, which is a file: name a place in a folder")
    if os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        try:
            return try_place(place) if place.is_dir() else None
        except OSError as error:
            if error.errno in disk_errors.NO_ROOM:  # which has advice of its own
                raise
            why = f"nothing can be made in {place}: {error.strerror}"
    else:
        read_only = hasattr(os, "statvfs") and os.statvfs(place).f_flag & os.ST_RDONLY
        why = "it is on a read-only file system" if read_only else "permission denied"
    raise InputError(f"{flag} {path} cannot be written ({why}): give another")


def check_new_file(path: Path, what: str, flag: str = "--out") -> None:
    """Refuse a place for a file, named by a flag, that cannot be written or holds something else than such a file.

    Args:
        what: the kind of file, of `_BEGINNINGS`.
    """
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder: name a file")
    check_writable(path, flag)
    check_writable(path.absolute().parent, flag)
    if not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{flag} {path} is a device or a pipe: name a file")
    with path.open("rb") as file:
        begins = file.read(4096)
    if begins and not re.match(_BEGINNINGS[what], begins):
        raise InputError(f"{flag} {path} is there and no {what}: name another file")


def check_file(path: str, flag: str) -> None:
    """Refuse a file to read, named by a flag, that is not there."""
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: there is no such file")


def check_runnable(*names: str | None) -> None:
    """Refuse artifacts to open that are neither here nor on the hub, nothing that slimdiff knows, or broken graphs."""
    for name in names:
        if name is None:
            continue
        kind = kind_of(name)
        if kind == "model" and find_component(name) is None:
            find_model(name)
        elif kind in ("plan", "statistics", "schedule"):
            raise not_runnable(name, kind)
        elif kind == "onnx":
            from exporters.graphs.reading import graph_files, read_graph, weight_files

            for graph in graph_files(graph_of(name, verified=False)):
                weight_files(graph, read_graph(graph))


def check_artifact(out: Path, kind: str, flag: str = "--out") -> None:
    """Refuse a place where no artifact can appear: see `check_folder`, and a mount point, which cannot be replaced."""
    if os.path.ismount(out):
        raise InputError(f"{flag} {out} is a mount point, which cannot be replaced as a whole: name a folder in it")
    check_folder(out, kind, flag)
    check_writable(out.absolute().parent, flag)


@contextmanager
def artifact_folder(out: Path, kind: str, flag: str = "--out") -> Iterator[Path]:
    """A folder to write an artifact into, which takes the place of `out` when the block ends well."""
    check_artifact(out, kind, flag)
    with manifest.replacing(out) as temporary:
        yield temporary

"""A bundle as one file, `.tar.zst` or a tarball in the layout of OCI images, and unpacking either safely.

The manifest comes first, and what follows must be the files that it lists: regular ones, of those sizes and hashes,
each once. So no more is ever written than the manifest says, and before anything is written that is held against the
size of the archive and the room on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from deploy.bundle.description import describe
from deploy.bundle.image import HEAD, Digest, image_files, is_image, open_image
from deploy.bundle.tar import PIECE, Entry, Reader, Writer, read_tar, write_tar
from slimdiff.errors import InputError, require
from slimdiff.storage import manifest as manifests

Kind = Literal["tar.zst", "oci"]
SUFFIXES: dict[Kind, str] = {"tar.zst": ".tar.zst", "oci": ".oci.tar"}
_ZSTD = b"\x28\xb5\x2f\xfd"
_LEVEL = 6  # weights hardly shrink; more takes longer for nothing
_MOST_EXPANSION = 100
"""How many times its own size an archive may unpack to; weights shrink by a tenth, JSON by ten times."""
_SLACK = 16 * 2**20


def pack(folder: Path, kind: Kind, file: Path, name: str, progress: str | None = None) -> None:
    """Write a bundle's folder as one file; the same folder gives the same bytes.

    Args:
        folder: a finished bundle.
        kind: of archive.
        file: to write; what is there is replaced.
        name: of the bundle, which an image is tagged with.
        progress: name of the progress bar on stderr; None: no bar.

    Raises:
        MissingPackageError: if zstandard is not here.
    """
    manifest = manifests.read_manifest(folder)
    names = [manifests.MANIFEST, *sorted(manifest["files"])]
    files = [(n, folder / n) for n in names]
    bar = tqdm(desc=progress, disable=progress is None, unit="B", unit_scale=True)
    with manifests.replacing(file, is_file=True) as temporary, temporary.open("wb") as out, bar:
        if kind == "oci":
            write_tar(_Counted(out, bar), image_files(files, name))
            return
        zstandard = require("zstandard", "bundle")
        with zstandard.ZstdCompressor(level=_LEVEL).stream_writer(out, closefd=False) as compressed:
            write_tar(_Counted(compressed, bar), files)


class _Counted:
    """A writer that shows how far it has come."""

    def __init__(self, into: Writer, bar: tqdm) -> None:
        self.into, self.bar = into, bar

    def write(self, data: bytes) -> None:
        self.into.write(data)
        self.bar.update(len(data))


def is_archive(path: Path) -> bool:
    """Whether a file begins like one of the two kinds."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return head.startswith(_ZSTD) or is_image(head)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a bundle's archive; what does not match its manifest is refused, and nothing of it is left.

    Args:
        archive: `.tar.zst` or an OCI image layout, as `pack` wrote it.
        folder: to appear; may be there if it is empty.

    Returns:
        the folder.

    Raises:
        InputError: if it is no such archive, is damaged, holds anything but what its manifest lists, would unpack to
            far more than its size, or does not fit on the disk.
        MissingPackageError: if zstandard is not here.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and is not an empty folder: name another to unpack into")
    with manifests.replacing(folder) as temporary, _contents(archive) as entries:
        _write_entries(entries, temporary, archive)
    return folder


@contextmanager
def _contents(archive: Path) -> Iterator[Iterator[Entry]]:
    """The bundle's files in an archive; after the last of them, what holds them is checked."""
    with archive.open("rb") as file:
        head = file.read(HEAD)
        file.seek(0)
        if head.startswith(_ZSTD):
            zstandard = require("zstandard", "bundle")
            window = 2**27  # bytes that are held; what this zstandard writes needs a sixteenth of it
            reader = zstandard.ZstdDecompressor(max_window_size=window).stream_reader(file, closefd=False)
            yield read_tar(_Decompressed(reader, zstandard.ZstdError, archive), str(archive))
        elif is_image(head):
            with open_image(file, archive) as entries:
                yield entries
        else:
            raise InputError(f"{archive} is no archive of a bundle: neither .tar.zst nor an OCI image layout")


class _Decompressed:
    """A reader whose faults are told in one line."""

    def __init__(self, reader: Reader, fault: type[Exception], archive: Path) -> None:
        self.reader, self.fault, self.archive = reader, fault, archive

    def read(self, size: int) -> bytes:
        try:
            return self.reader.read(size)
        except self.fault as error:
            raise InputError(f"{self.archive} is damaged ({error}): copy it again") from error


def _write_entries(entries: Iterator[Entry], folder: Path, archive: Path) -> None:
    first = next(entries, None)
    if first is None or first.name != manifests.MANIFEST or first.size > manifests.MOST_JSON:
        raise InputError(f"{archive} does not begin with a {manifests.MANIFEST}: it is no archive of a bundle")
    (folder / manifests.MANIFEST).write_bytes(first.all())
    manifest = manifests.read_manifest(folder)
    describe(manifest, f"{archive}: {manifests.MANIFEST}")
    left = dict(manifest["files"])
    _demand_room(sum(entry["bytes"] for entry in left.values()), archive, folder)
    for entry in entries:
        expected = left.pop(entry.name, None)
        if expected is None:
            raise InputError(f"{archive} holds {entry.name}, which its manifest does not list, or it holds it twice")
        if entry.size != expected["bytes"]:
            raise InputError(f"{archive}: {entry.name} has {entry.size} bytes, its manifest says {expected['bytes']}")
        if _write(entry, folder) != f"sha256:{expected['sha256']}":
            raise InputError(f"{archive}: {entry.name} is not what its manifest says (SHA-256 differs): refused")
    if left:
        raise InputError(f"{archive} lacks {next(iter(left))}, which its manifest lists: copy it again, whole")


def _write(entry: Entry, folder: Path) -> str:
    file, digest = folder / entry.name, Digest()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            while piece := entry.content.read(PIECE):
                digest.write(piece)
                out.write(piece)
    except (FileExistsError, NotADirectoryError) as error:  # one name is another's folder, or differs in case alone
        raise InputError(f"{entry.name} cannot lie beside the other files of its archive: refused") from error
    return digest.name


def _demand_room(needed: int, archive: Path, folder: Path) -> None:
    size = archive.stat().st_size
    if needed > _MOST_EXPANSION * size + _SLACK:
        raise InputError(f"{archive} has {size} bytes and would unpack to {needed}: refused, no bundle shrinks so much")
    free, there = shutil.disk_usage(folder).free, folder.parent.parent  # it is not yet where it will be
    if needed > free:
        raise InputError(f"{archive} unpacks to {needed} bytes, and {free} are free at {there}: free some")

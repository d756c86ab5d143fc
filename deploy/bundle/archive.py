"""A bundle as one file, `.tar.zst`, and unpacking one safely.

The manifest comes first, and the files that it lists follow: regular ones of those sizes and hashes, each once. Of
files of one content, such as weights that a Triton repository shares, the others are hard links to the first. So
unpacking never writes more than the manifest says, and before it writes anything it holds that against the size of the
archive and the room on the disk. Other links, devices, folders and extended headers, which attacks by archives are made
of, are refused before they are read.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.artifacts.kinds import is_archive
from deploy.bundle.description import describe
from slimdiff.errors import InputError, require
from slimdiff.progress import bar
from slimdiff.storage import manifest as manifests

SUFFIX = ".tar.zst"
_LEVEL = 6  # weights hardly shrink; more takes longer for nothing
_WINDOW = 2**27
"""Bytes that decompression may hold; what `pack` writes needs a sixteenth."""
_LONGEST = 100
"""Bytes of a name that need no extended header."""
_MOST_EXPANSION = 100
"""How many times its own size an archive may unpack to; weights shrink by a tenth, JSON by ten times."""
_SLACK = 16 * 2**20


class _File(tarfile.TarInfo):
    """The header of a regular file or a hard link; any other is refused before `tarfile` reads what it announces."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _File:
        info = super().frombuf(buf, encoding, errors)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE):
            raise _odd(info)
        return info


def _odd(info: tarfile.TarInfo) -> InputError:
    return InputError(f"the archive holds {info.name!r}, which is no regular file: refused")


def pack(folder: Path, file: Path) -> None:
    """Write a bundle's folder as one file; the same folder gives the same bytes.

    Raises:
        InputError: if a name is too long, or a file has another size than the manifest says or is cut short meanwhile.
        MissingPackageError: if zstandard is not installed.
    """
    zstandard = require("zstandard", "bundle")
    files = manifests.read_manifest(folder)["files"]
    first = {entry["sha256"]: name for name, entry in sorted(files.items(), reverse=True)}
    sizes = {name: (folder / name).stat().st_size for name in (manifests.MANIFEST, *sorted(files))}
    for name, size in sizes.items():
        if len(name.encode()) > _LONGEST:
            raise InputError(f"{name} is too long a name for an archive: at most {_LONGEST} bytes")
        if name in files and size != files[name]["bytes"]:
            raise InputError(f"{folder / name} changed after its manifest was written: make the bundle again")
    with (
        manifests.replacing(file, is_file=True) as temporary,
        temporary.open("wb") as out,
        zstandard.ZstdCompressor(level=_LEVEL).stream_writer(out, closefd=False) as compressed,
        # GNU's format writes sizes of 8 GB and more without an extended header.
        tarfile.open(fileobj=compressed, mode="w|", format=tarfile.GNU_FORMAT) as tar,
        bar(total=sum(sizes.values()), name="archive", unit="B", unit_scale=True) as progress,
    ):
        for name, size in sizes.items():
            info = tarfile.TarInfo(name)  # neither times nor owners: the same files give the same bytes
            info.size, info.mode = size, 0o644
            if name in files and (there := first[files[name]["sha256"]]) != name:
                info.size, info.type, info.linkname = 0, tarfile.LNKTYPE, there
            try:
                with (folder / name).open("rb") as content:
                    tar.addfile(info, content)
            except OSError as error:
                if error.errno is None:  # tarfile's own: the content ended early
                    raise InputError(f"{name} changed while it was written into the archive") from error
                raise
            progress.update(size)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a bundle's archive; one that does not match its manifest is refused, and nothing of it is left.

    Args:
        archive: `.tar.zst`, as `pack` wrote it.
        folder: to appear; may be there if it is empty.

    Returns:
        the folder.

    Raises:
        InputError: if it is no such archive, is damaged, holds anything but the files that its manifest lists, would
            unpack to far more than its size, or does not fit on the disk.
        MissingPackageError: if zstandard is not installed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and is not an empty folder: name another to unpack into")
    with manifests.replacing(folder) as temporary, _opened(archive) as tar:
        _extract(tar, temporary, archive)
    return folder


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive as a stream: what is not read in its order is gone."""
    if not is_archive(archive):
        raise InputError(f"{archive} is no archive of a bundle: it is not a {SUFFIX} file")
    zstandard = require("zstandard", "bundle")
    with archive.open("rb") as file:
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(file, closefd=False)
        try:
            with tarfile.open(fileobj=reader, mode="r|", tarinfo=_File) as tar:
                yield tar
        except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
            raise InputError(f"{archive} is damaged, or ends early ({error}): copy it again, whole") from error


def _extract(tar: tarfile.TarFile, folder: Path, archive: Path) -> None:
    first = tar.next()
    if first is not None and not first.isreg():
        raise _odd(first)
    if first is None or first.name != manifests.MANIFEST or first.size > manifests.MOST_JSON:
        raise InputError(f"{archive} does not begin with a {manifests.MANIFEST}: it is no archive of a bundle")
    _write(tar, first, folder / manifests.MANIFEST)
    manifest = manifests.read_manifest(folder)
    describe(manifest, f"{archive}: {manifests.MANIFEST}")
    missing = dict(manifest["files"])
    _demand_room(sum(entry["bytes"] for entry in missing.values()), archive, folder)
    while (info := tar.next()) is not None:
        expected = missing.pop(info.name, None)
        if expected is None:
            raise InputError(f"{archive} holds {info.name}, which its manifest does not list, or it holds it twice")
        if info.islnk():
            written = info.linkname not in (*missing, info.name)
            if not written or manifest["files"].get(info.linkname) != expected:
                raise _odd(info)
            _link(folder / info.linkname, folder / info.name)
            continue
        if info.size != expected["bytes"]:
            raise InputError(f"{archive}: {info.name} has {info.size} bytes, its manifest says {expected['bytes']}")
        _write(tar, info, folder / info.name)
        if manifests.sha256_of(folder / info.name) != expected["sha256"]:
            raise InputError(f"{archive}: {info.name} is not what its manifest says (SHA-256 differs): refused")
    if missing:
        raise InputError(f"{archive} lacks {next(iter(missing))}, which its manifest lists: copy it again, whole")


def _link(there: Path, file: Path) -> None:
    """The same content under another name, once on the disk where that can do hard links."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            file.hardlink_to(there)
            return
        with there.open("rb") as content, file.open("xb") as out:
            shutil.copyfileobj(content, out, 1 << 20)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{file.name} cannot lie beside the other files of its archive: refused") from error


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, file: Path) -> None:
    content = tar.extractfile(info)
    assert content is not None  # `_File` and `_extract` refuse all others
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            shutil.copyfileobj(content, out, 1 << 20)
    except (FileExistsError, NotADirectoryError) as error:  # one name is another's folder, or differs in case alone
        raise InputError(f"{file.name} cannot lie beside the other files of its archive: refused") from error


def _demand_room(needed: int, archive: Path, folder: Path) -> None:
    size = archive.stat().st_size
    if needed > _MOST_EXPANSION * size + _SLACK:
        raise InputError(f"{archive} has {size} bytes and would unpack to {needed}: refused, no bundle shrinks so much")
    free, place = shutil.disk_usage(folder).free, folder.parent.parent  # it is not yet where it will be
    if needed > free:
        raise InputError(f"{archive} unpacks to {needed} bytes, and {free} are free at {place}: free some")

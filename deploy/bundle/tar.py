"""The plainest tar there is: regular files with short names, the same bytes for the same files.

Reading takes nothing else either: no links, devices, folders or extended headers, which are what attacks by archives
are made of. `tarfile` builds and parses the headers; what follows them is counted here.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from slimdiff.errors import InputError
from slimdiff.storage.manifest import is_inside

BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * BLOCK)
PIECE = 1 << 20
"""Bytes that are read at a time."""
_LONGEST = 100  # bytes of a name that need no extended header


class Reader(Protocol):
    """Something to read bytes from, front to back."""

    def read(self, size: int, /) -> bytes:
        """Up to so many bytes; none at the end."""


class Writer(Protocol):
    """Something to write bytes to."""

    def write(self, data: bytes, /) -> object:
        """All of them."""


@dataclass(frozen=True)
class Nested:
    """An archive within an archive, written without being held anywhere."""

    files: Sequence[tuple[str, Path]]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(BLOCK + size + _padding(size) for size in (f.stat().st_size for _, f in self.files)) + len(_END)


@dataclass(frozen=True)
class Entry:
    """One file of an archive that is being read."""

    name: str
    size: int
    content: Reader
    """To be read before the next entry comes; what is left then is skipped."""

    def all(self) -> bytes:
        """The whole content, in memory."""
        return b"".join(iter(lambda: self.content.read(PIECE), b""))


def write_tar(into: Writer, files: Iterable[tuple[str, Path | bytes | Nested]]) -> None:
    """Write files, as paths or as their content, under the names given, in the order given.

    Raises:
        InputError: if a name is too long, or a file changes its size meanwhile.
    """
    for name, source in files:
        if isinstance(source, bytes):
            into.write(_header(name, len(source)))
            _copy(io.BytesIO(source), into, len(source), name)
        elif isinstance(source, Nested):
            into.write(_header(name, source.size))
            write_tar(into, source.files)  # whole blocks: nothing to fill up
        else:
            size = source.stat().st_size
            into.write(_header(name, size))
            with source.open("rb") as file:
                _copy(file, into, size, name)
    into.write(_END)


def _header(name: str, size: int) -> bytes:
    if len(name.encode()) > _LONGEST:
        raise InputError(f"{name} is too long a name for an archive: at most {_LONGEST} bytes")
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT)  # which writes sizes of 8 GB and more without an extended header


def _copy(source: BinaryIO, into: Writer, size: int, name: str) -> None:
    left = size
    while left and (piece := source.read(min(left, PIECE))):
        into.write(piece)
        left -= len(piece)
    if left or source.read(1):
        raise InputError(f"{name} changed while it was written into the archive")
    into.write(bytes(_padding(size)))


def _padding(size: int) -> int:
    return -size % BLOCK


def read_tar(source: Reader, where: str) -> Iterator[Entry]:
    """The files of an archive that `write_tar` wrote, one after the other.

    Args:
        source: its bytes.
        where: named in errors.

    Raises:
        InputError: for anything else: another kind of entry, a name that leads elsewhere, an archive that ends early.
    """
    while True:
        block = _exactly(source, BLOCK, where)
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise InputError(f"{where} is damaged, or no tar archive ({error})") from error
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise InputError(f"{where} holds {info.name!r}, which is no regular file: refused")
        if not is_inside(info.name) or info.size < 0:
            raise InputError(f"{where} holds a file {info.name!r}, which is outside the archive: refused")
        part = _Part(source, info.size, where)
        yield Entry(info.name, info.size, part)
        part.skip()
        _exactly(source, _padding(info.size), where)


class _Part:
    """So many bytes of a reader."""

    def __init__(self, source: Reader, size: int, where: str) -> None:
        self.source, self.left, self.where = source, size, where

    def read(self, size: int) -> bytes:
        piece = self.source.read(min(size, self.left))
        if not piece and self.left and size:
            raise InputError(f"{self.where} ends early: copy it again, whole")
        self.left -= len(piece)
        return piece

    def skip(self) -> None:
        while self.left:
            self.read(PIECE)


def _exactly(source: Reader, size: int, where: str) -> bytes:
    part = _Part(source, size, where)
    found = bytearray()
    while part.left:
        found += part.read(part.left)
    return bytes(found)

"""A bundle in the layout of an OCI image: one layer, in which it is the folder `/bundle`.

https://github.com/opencontainers/image-spec, version 1.0: `oci-layout`, `index.json`, and blobs named by their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.bundle.tar import PIECE, Entry, Nested, Reader, read_tar, write_tar
from slimdiff.errors import InputError

_LAYOUT_AT = (257, 262)  # where a tar header says that it is one
HEAD = _LAYOUT_AT[1]
"""Bytes by which an image is known."""
_MOST_BLOB = 4 * 2**20  # bytes of an image's own JSON
_IMAGE = "application/vnd.oci.image"
_INSIDE = "bundle"  # the folder of an image that holds the bundle


class Digest:
    """Takes bytes for their hash alone."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.sha256.update(data)

    @property
    def name(self) -> str:
        """`sha256:` and the hash, hexadecimal."""
        return f"sha256:{self.sha256.hexdigest()}"


def image_files(files: list[tuple[str, Path]], name: str) -> Iterator[tuple[str, Path | bytes | Nested]]:
    """The files of an OCI image layout: an image of one layer, in which the bundle is the folder `/bundle`."""
    layer = Nested([(f"{_INSIDE}/{n}", path) for n, path in files])
    digest = Digest()
    write_tar(digest, layer.files)
    machine = platform.machine().lower()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine),
        "os": "linux",
        "config": {"Labels": {"org.opencontainers.image.title": name}},
        "rootfs": {"type": "layers", "diff_ids": [digest.name]},
    }
    blobs = {"config": _json(config)}
    blobs["manifest"] = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_IMAGE}.manifest.v1+json",
            "config": _descriptor(f"{_IMAGE}.config.v1+json", blobs["config"]),
            "layers": [{"mediaType": f"{_IMAGE}.layer.v1.tar", "digest": digest.name, "size": layer.size}],
        }
    )
    tagged = {"annotations": {"org.opencontainers.image.ref.name": name}}
    index = {
        "schemaVersion": 2,
        "mediaType": f"{_IMAGE}.index.v1+json",
        "manifests": [_descriptor(f"{_IMAGE}.manifest.v1+json", blobs["manifest"]) | tagged],
    }
    yield "oci-layout", _json({"imageLayoutVersion": "1.0.0"})
    yield "index.json", _json(index)
    for blob in blobs.values():
        yield _blob(_sha256(blob)), blob
    yield _blob(digest.name), layer


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _sha256(blob), "size": len(blob)}


def _sha256(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def is_image(head: bytes) -> bool:
    """Whether a file that begins so is an image's tarball, of ours."""
    return head.startswith(b"oci-layout\0") and head[slice(*_LAYOUT_AT)] == b"ustar"


@contextmanager
def open_image(file: Reader, archive: Path) -> Iterator[Iterator[Entry]]:
    """The bundle's files in an image; after the last of them, the layer's hash is checked.

    Args:
        file: at the image's first byte.
        archive: its name, for errors.

    Raises:
        InputError: if it is no such image, or is damaged.
    """
    layer, digest = _layer(read_tar(file, str(archive)), archive)
    hashed = _Hashed(layer.content)
    yield (_inside(entry) for entry in read_tar(hashed, str(archive)))
    while hashed.read(PIECE):
        continue
    if hashed.digest.name != digest:
        raise InputError(f"{archive}: its layer is not what its manifest says (SHA-256 differs): refused")


class _Hashed:
    """A reader that takes the hash of what goes through it."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.digest = reader, Digest()

    def read(self, size: int) -> bytes:
        piece = self.reader.read(size)
        self.digest.write(piece)
        return piece


def _layer(entries: Iterator[Entry], archive: Path) -> tuple[Entry, str]:
    """The layer of an image whose files are in the order of `pack`, and the hash that it must have."""
    small: dict[str, bytes] = {}
    for entry in entries:
        layer = _described(small, archive)
        if layer is not None and entry.name == _blob(layer["digest"]):
            if entry.size != layer["size"]:
                raise InputError(f"{archive}: its layer has {entry.size} bytes, and its manifest says {layer['size']}")
            return entry, layer["digest"]
        if entry.size > _MOST_BLOB or len(small) >= 8:
            raise InputError(f"{archive} is an image, but none that `slimdiff bundle` wrote: refused")
        small[entry.name] = entry.all()
    raise InputError(f"{archive} holds no bundle: its layer is missing")


def _described(small: dict[str, bytes], archive: Path) -> dict[str, Any] | None:
    """What the image's manifest says of its layer; None as long as that is not there."""
    if "index.json" not in small:
        return None
    try:
        digest = str(json.loads(small["index.json"])["manifests"][0]["digest"])
        blob = small.get(_blob(digest))
        if blob is None:
            return None
        if _sha256(blob) != digest:
            raise InputError(f"{archive}: its manifest is not the one that its index names (SHA-256 differs): refused")
        (layer,) = json.loads(blob)["layers"]
        return {"digest": str(layer["digest"]), "size": int(layer["size"])}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{archive} is no image that can be read ({error})") from error


def _inside(entry: Entry) -> Entry:
    return Entry(entry.name.removeprefix(f"{_INSIDE}/"), entry.size, entry.content)

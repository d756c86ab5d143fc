"""Bundles as one file: the same bytes every time, and nothing unpacked that the manifest does not list."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import DESCRIPTION

from deploy.bundle.archive import is_archive, pack, unpack
from slimdiff import InputError
from slimdiff.storage import manifest as manifests

zstandard = pytest.importorskip("zstandard", reason="archives need the extra bundle")

FILES = {
    "README.md": b"read me",
    "unet/config.json": b"{}",
    "unet/model.onnx": b"a graph",
    "unet/model.onnx.data": os.urandom(100_000),
    "vae_decoder/model.onnx": b"another",
}


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A folder that is a bundle by its manifest; its graphs are none."""
    folder = tmp_path / "bundle"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifests.write_manifest(folder, "bundle", {}, DESCRIPTION.model_dump())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_unpacked_is_what_was_packed(bundle, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    pack(bundle, first)
    for file in bundle.rglob("*"):  # neither times nor modes are in it
        os.utime(file, (1, 1))
    (bundle / "README.md").chmod(0o755)
    pack(bundle, second)
    assert first.read_bytes() == second.read_bytes() and is_archive(first)
    assert content(unpack(first, tmp_path / "out")) == content(bundle)
    manifests.verify_manifest(tmp_path / "out", exact=True)
    with pytest.raises(InputError, match="not an empty folder"):
        unpack(first, tmp_path / "out")


def test_a_file_that_is_cut_short_while_it_is_read(bundle, tmp_path, monkeypatch):
    add = tarfile.TarFile.addfile

    def cut_and_add(tar, info, content):
        os.truncate(bundle / "unet/model.onnx.data", 10)
        add(tar, info, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", cut_and_add)
    with pytest.raises(InputError, match="^unet/model.onnx.data changed while it was written into the archive$"):
        pack(bundle, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_tools_read_the_archive(bundle, tmp_path):
    pack(bundle, tmp_path / "x")
    with (tmp_path / "x").open("rb") as file:
        raw = zstandard.ZstdDecompressor().stream_reader(file).read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        assert tar.getnames() == ["manifest.json", *sorted(FILES)]
        assert tar.extractfile("unet/model.onnx.data").read() == FILES["unet/model.onnx.data"]


def test_files_of_one_content_are_in_it_once(bundle, tmp_path):
    twice = {"triton/models/unet/1/model.onnx.data": "unet/model.onnx.data"}
    for name, other in twice.items():
        (bundle / name).parent.mkdir(parents=True)
        (bundle / name).write_bytes((bundle / other).read_bytes())
    about = manifests.read_manifest(bundle)
    manifests.write_manifest(bundle, about["kind"], about["made_from"], about["runs_on"])
    pack(bundle, tmp_path / "x")
    raw = zstandard.ZstdDecompressor().stream_reader((tmp_path / "x").read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:  # as other tools read it
        links = {info.name: info.linkname for info in tar if info.islnk()}
        assert {frozenset(pair) for pair in links.items()} == {frozenset(pair) for pair in twice.items()}
        tar.extractall(tmp_path / "elsewhere", filter="data")
    out = unpack(tmp_path / "x", tmp_path / "out")
    assert content(out) == content(bundle) == content(tmp_path / "elsewhere")
    assert all((out / name).samefile(out / other) for name, other in twice.items())


def member(name: str, content: bytes = b"", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def packed(file: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    file.write_bytes(zstandard.ZstdCompressor().compress(raw.getvalue()))
    return file


def whole(bundle: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member("manifest.json", (bundle / "manifest.json").read_bytes()), *(member(n, FILES[n]) for n in FILES)]


def listing(bundle: Path, change: Callable[[dict], None]) -> tuple[tarfile.TarInfo, bytes]:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    return member("manifest.json", json.dumps(manifest).encode())


HOSTILE = {
    "path traversal": lambda b, all: [*all, member("../outside.txt", b"x")],
    "an absolute path": lambda b, all: [*all, member("/tmp/slimdiff-outside.txt", b"x")],
    "a symbolic link": lambda b, all: [all[0], member("unet", type=tarfile.SYMTYPE, linkname="/tmp"), *all[1:]],
    "a hard link": lambda b, all: [all[0], member("x.txt", type=tarfile.LNKTYPE, linkname="/etc/passwd"), *all[1:]],
    "a hard link to another content": lambda b, all: [
        *all[:-1],
        member(all[-1][0].name, type=tarfile.LNKTYPE, linkname=all[1][0].name),
    ],
    "a hard link to itself": lambda b, all: [
        *all[:-1],
        member(all[-1][0].name, type=tarfile.LNKTYPE, linkname=all[-1][0].name),
    ],
    "a hard link outside": lambda b, all: [
        *all[:-1],
        member(all[-1][0].name, type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    ],
    "a manifest that is a link": lambda b, all: [
        member("manifest.json", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        *all[1:],
    ],
    "a device": lambda b, all: [all[0], member("x.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5), *all[1:]],
    "a fifo": lambda b, all: [all[0], member("x.txt", type=tarfile.FIFOTYPE), *all[1:]],
    "a folder": lambda b, all: [all[0], member("unet", type=tarfile.DIRTYPE), *all[1:]],
    "a file that is not listed": lambda b, all: [*all, member("unet/added.json", b"{}")],
    "a pickle": lambda b, all: [*all, member("unet/weights.bin", b"\x80\x04.")],
    "a file twice": lambda b, all: [*all, all[1]],
    "a file missing": lambda b, all: all[:-1],
    "the manifest last": lambda b, all: [*all[1:], all[0]],
    "no manifest": lambda b, all: all[1:],
    "nothing": lambda b, all: [],
    "another content": lambda b, all: [*all[:-1], member("vae_decoder/model.onnx", b"AnOther")],
    "a longer file": lambda b, all: [*all[:-1], member("vae_decoder/model.onnx", b"another and more")],
    "a listed path outside": lambda b, all: [
        listing(b, lambda m: m["files"].update({"../x.json": {"sha256": "0" * 64, "bytes": 1}})),
        *all[1:],
    ],
    "a listed pickle": lambda b, all: [
        listing(b, lambda m: m["files"].update({"x.pt": {"sha256": "0" * 64, "bytes": 1}})),
        *all[1:],
        member("x.pt", b"x"),
    ],
    "a file in another's place": lambda b, all: [
        listing(b, lambda m: m["files"].update({"README.md/x.json": {"sha256": "0" * 64, "bytes": 1}})),
        *all[1:],
        member("README.md/x.json", b"x"),
    ],
    "more than fits": lambda b, all: [
        listing(b, lambda m: m["files"].update({"x.data": {"sha256": "0" * 64, "bytes": 2**60}})),
        *all[1:],
    ],
    "a bomb": lambda b, all: [
        listing(b, lambda m: m["files"].update({"x.data": {"sha256": "0" * 64, "bytes": 60 * 2**20}})),
        *all[1:],
        member("x.data", bytes(60 * 2**20)),
    ],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_archives_leave_nothing_behind(bundle, tmp_path, what):
    file = packed(tmp_path / "hostile.tar.zst", HOSTILE[what](bundle, whole(bundle)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        unpack(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert set(tmp_path.rglob("*")) == before


def test_extended_headers_are_refused_unread(bundle, tmp_path):
    """They say how long they are themselves, and `tarfile` would hold all of it in memory."""
    long = member("unet/" + "x" * 150 + ".json", b"{}")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = packed(tmp_path / "hostile.tar.zst", [*whole(bundle), long], form)
        with pytest.raises(InputError, match="which is no regular file"):
            unpack(file, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_an_archive_that_ends_early(bundle, tmp_path, share):
    pack(bundle, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(InputError):
        unpack(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_changed_byte_gets_through(bundle, tmp_path):
    """Every one of 100 bytes all over the archive, changed by itself: refused, or the files are what they were."""
    pack(bundle, tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    expected = content(bundle)
    for i in range(100):
        place = i * len(raw) // 100
        (tmp_path / "y").write_bytes(raw[:place] + bytes([raw[place] ^ 0x41]) + raw[place + 1 :])
        out = tmp_path / f"out-{i}"
        try:
            unpack(tmp_path / "y", out)
        except InputError:
            assert not out.exists()
        else:
            assert content(out) == expected

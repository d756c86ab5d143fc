"""A full or read-only disk: what was there stays, the error says why. File systems are real (tmpfs, bind mounts)."""

from __future__ import annotations

import shutil

import pytest
from faults import contents, leftovers

from deploy.history import results


@pytest.mark.parametrize("size", [0, 64, 1000])
def test_a_disk_that_takes_no_more_leaves_what_was_there(forks, tmp_path, size):
    out = tmp_path / "build"
    assert forks.run("quick_build:build", out, "old").code == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    failed = forks.run("quick_build:build", out, "new" * 1000, file_size=size)
    assert failed.code == 70 and "File too large" in failed.said
    assert all(p.read_bytes() == content for p, content in before.items()) and leftovers(out) == []
    assert forks.run("quick_build:build", out, "new" * 1000).code == 0


@pytest.mark.parametrize("room", [0, 1, 500, 2999])
def test_a_history_on_a_full_disk_is_as_it_was(forks, tmp_path, room):
    file = tmp_path / "h.jsonl"
    results.append(file, {"index": 0})
    before = file.read_bytes()
    failed = forks.run("quick_build:append", file, 1, 1, file_size=len(before) + room)
    assert failed.code == 70 and "cannot be written (File too large)" in failed.said
    assert file.read_bytes() == before


@pytest.mark.parametrize("stage", ["calibrate", "slim", pytest.param("export", marks=pytest.mark.slow)])
def test_a_disk_that_is_full(forks, workshop, undisturbed, tmp_path, stage):
    if forks.no_mounts:
        pytest.skip(f"no mounts here: {forks.no_mounts}")
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    build, argv = disk / "build", ["build", workshop / "recipe.yaml", "--out", disk / "build"]
    forks.shell(f"mount -t tmpfs -o size=20m slimdiff-test {disk} && cp -r {workshop}/build {build}")
    forks.shell(f"cat /dev/zero > {disk}/filler 2>/dev/null; truncate -s -200k {disk}/filler")
    failed = forks.command([*argv, "--force", stage]).wait()
    forks.shell(f"cp -r {build} {copy} && rm {disk}/filler")
    assert failed.code == 2 and f"{build}: no space left on the device" in failed.error, failed.said
    assert contents(copy) == undisturbed and leftovers(copy) == []
    done = forks.command(argv).wait()
    assert done.code == 0, done.said
    forks.shell(f"rm -r {copy} && cp -r {build} {copy} && umount {disk}")
    assert contents(copy) == undisturbed


@pytest.mark.parametrize("command", ["build", "finished build", "compress", "calibrate", "bundle", "history"])
def test_a_read_only_folder(forks, workshop, undisturbed, tmp_path, command):
    if forks.no_mounts:
        pytest.skip(f"no mounts here: {forks.no_mounts}")
    folder = tmp_path / "disk"
    shutil.copytree(workshop / "build", folder / "build")
    model, build = workshop / "tiny", folder / "build"
    argv = {
        "build": ["build", workshop / "recipe.yaml", "--out", folder / "new"],
        "finished build": ["build", workshop / "recipe.yaml", "--out", build],
        "compress": ["compress", model, "--reduce", "8%", "--out", folder / "new"],
        "calibrate": ["calibrate", model, "--out", folder / "new.safetensors"],
        "bundle": ["bundle", build, "--target", "edge", "--out", folder / "new"],
        "history": ["bench", model, model, "--history", folder / "new.jsonl"],
    }[command]
    forks.shell(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
    failed = forks.command(argv).wait()
    looked = forks.command(["inspect", build]).wait()
    forks.shell(f"umount {folder}")
    assert failed.code == 2 and "cannot be written (it is on a read-only file system)" in failed.error, failed.said
    assert looked.code == 0, looked.said
    assert [p.name for p in folder.iterdir()] == ["build"] and contents(build) == undisturbed

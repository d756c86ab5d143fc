"""Artifacts appear whole or not at all, and their manifests are believed only after checking."""

from __future__ import annotations

import json

import pytest

from slimdiff import InputError
from slimdiff.storage import manifest as manifests


def folder_with(tmp_path, **files: str):
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    manifests.write_manifest(folder, "test", {"recipe": "x"})
    return folder


def test_a_failed_write_leaves_the_old_one_and_no_litter(tmp_path):
    target = tmp_path / "out"
    with manifests.replacing(target) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), manifests.replacing(target) as temporary:
        (temporary / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with manifests.replacing(target) as temporary:
        (temporary / "b").write_text("new")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_leads_to_what_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name, is_file in (("folder", False), ("file", True)):
        target, link = tmp_path / "elsewhere" / name, tmp_path / name
        link.symlink_to(target)
        for text in ("old", "new"):
            with manifests.replacing(link, is_file=is_file) as temporary:
                (temporary if is_file else temporary / "a").write_text(text)
            assert link.is_symlink() and (target if is_file else target / "a").read_text() == text
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["file", "folder"]


def test_no_lock_and_no_leftover_is_part_of_an_artifact(tmp_path):
    folder = folder_with(tmp_path, a="1")
    (folder / ".lock").write_text("123")
    (folder / ".x.0123abcd.partial").mkdir()
    (folder / ".x.0123abcd.partial" / "x").write_text("half")
    assert set(manifests.write_manifest(folder, "test", {})["files"]) == {"a"}


def test_manifest_accepts_what_it_describes(tmp_path):
    folder = folder_with(tmp_path, a="1", b="2")
    assert set(manifests.verify_manifest(folder)["files"]) == {"a", "b"}


def test_manifest_sees_a_changed_a_missing_and_an_outside_file(tmp_path):
    folder = folder_with(tmp_path, a="1", b="2")
    (folder / "a").write_text("3")
    with pytest.raises(InputError, match="SHA-256 differs"):
        manifests.verify_manifest(folder)
    (folder / "a").unlink()
    with pytest.raises(InputError, match="lacks a"):
        manifests.verify_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"../../etc/passwd": {"sha256": "0", "bytes": 0}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="outside"):
        manifests.verify_manifest(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": {}, "schema": 99}'])
def test_a_broken_manifest_is_refused(tmp_path, text):
    folder = folder_with(tmp_path, a="1")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(InputError):
        manifests.verify_manifest(folder)


def test_fingerprints_depend_on_values_not_on_order():
    assert manifests.fingerprint({"a": 1, "b": [2]}) == manifests.fingerprint({"b": [2], "a": 1})
    assert manifests.fingerprint({"a": 1}) != manifests.fingerprint({"a": 2})

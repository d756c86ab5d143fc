"""The hub's local cache: snapshots whose files are links into the blobs of the same repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_cache import cached
from huggingface_hub import constants

from deploy.artifacts.files import save_pipeline
from slimdiff import InputError
from slimdiff.loading.pipelines import load_pipeline
from slimdiff.storage import manifest


@pytest.fixture
def snapshot(pipeline, tmp_path, monkeypatch) -> Path:
    save_pipeline(pipeline, tmp_path / "model")
    manifest.write_manifest(tmp_path / "model", "slim-model", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return cached(tmp_path / "model", tmp_path / "hub", "org/model")


def test_a_cached_model_opens_by_its_id_and_by_its_folder(snapshot):
    assert type(load_pipeline("org/model")) is type(load_pipeline(snapshot))


def test_a_cached_model_is_found_below_the_librarys_home(snapshot, tmp_path):
    """What the environment says is read by the hub's library when it is first imported."""
    asked = "from slimdiff.loading.naming import find_model; print(find_model('org/model'))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == snapshot


def test_what_is_not_in_the_cache_is_said_in_one_line(snapshot):
    with pytest.raises(InputError, match=r"org/other is not in the hub's cache .*hub, and HF_HUB_OFFLINE is set"):
        load_pipeline("org/other")


def test_links_to_other_places_are_refused_as_ever(snapshot, tmp_path):
    file = snapshot / "vae" / "config.json"
    outside = Path(shutil.copyfile(file, tmp_path / "config.json"))
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(InputError, match="outside the artifact"):
        load_pipeline(snapshot)

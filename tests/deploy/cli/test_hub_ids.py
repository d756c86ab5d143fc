"""Commands take what is in the hub's local cache by its id, where the hub may not be asked."""

from __future__ import annotations

import importlib.util

import pytest
from hub_cache import cached
from huggingface_hub import constants

from deploy.artifacts.hashes import public_name
from deploy.cli.app import main


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["org/tiny--model.v1", "org/model"])
def test_a_snapshot_has_the_name_of_its_repository(name, workspace, hub):
    assert public_name(str(cached(workspace / "tiny", hub, name))) == name
    assert public_name(str(workspace / "tiny")) == "tiny"


def test_an_exported_folder_makes_images_bundles_and_engines_by_its_id(exported, hub, tmp_path, capsys, monkeypatch):
    cached(exported, hub, "org/onnx")
    monkeypatch.chdir(tmp_path)
    image = ("--prompt", "a circle", "--steps", "2", "--out", "image.png")
    commands = [
        ("inspect", "org/onnx"),
        ("generate", "org/onnx", *image),
        ("bundle", "org/onnx", "--target", "edge", "--out", "bundle"),
        ("generate", "bundle", *image),
    ]
    if importlib.util.find_spec("tensorrt_rtx") and importlib.util.find_spec("polygraphy"):
        commands.append(("engine", "org/onnx", "--target", "sm89", "--out", "engine"))
    for command in commands:
        assert main([*command, "--json"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", ["engine", "bundle"])
def test_what_is_not_in_the_cache_is_one_line(command, hub, tmp_path, capsys):
    more = ["--target", "edge"] if command == "bundle" else []
    assert main([command, "org/none", "--out", str(tmp_path / "out"), *more]) == 2
    assert "org/none is not in the hub's cache" in capsys.readouterr().err

"""`deploy` as a Python package: what it offers, and that asking for nothing loads nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploy
from deploy.build import chain
from deploy.cli.app import main
from deploy.recipe.recipe import load_recipe
from slimdiff.errors import InputError

ROOT = Path(deploy.__file__).parents[1]


def test_the_package_loads_no_library():
    script = (
        "import sys, deploy\nfound = {'torch', 'diffusers', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "sys.exit(' '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_build_from_python_is_the_commands_build(built, workspace, tmp_path):
    """It takes the command's folder for its own: every stage is found done."""
    folder = shutil.copytree(built, tmp_path / "build")
    whole = deploy.run_build(load_recipe(workspace / "recipe.yaml"), "recipe", folder)
    assert whole["exit_code"] == 0 and whole["stages"] and all(stage["reused"] for stage in whole["stages"])


def test_the_command_calls_the_same_function(workspace, tmp_path, monkeypatch, capsys):
    def stop(recipe, name, folder, *_):
        raise InputError(f"{name} in {folder.name}")

    assert deploy.run_build is chain.run_build is deploy.build.run_build
    monkeypatch.setattr("deploy.build.run_build", stop)
    assert main(["build", str(workspace / "recipe.yaml"), "--out", str(tmp_path / "here")]) == 2
    assert "error: recipe in here" in capsys.readouterr().err


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'compress'"):
        _ = deploy.compress

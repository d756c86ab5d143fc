"""Names are bytes: they are written as they are, whatever the terminal's letters, and shown with escapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli

ROOT = Path(cli.__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
UTF8 = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}


def run(argv: list[bytes], folder: Path, locale: dict[str, str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    call = [os.fsencode(sys.executable), b"-m", b"slimdiff", *argv]
    done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, timeout=120)
    assert b"Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    "locale", [pytest.param(ASCII, id="ascii"), pytest.param(UTF8, id="utf-8", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gr\u00fcn \u2603".encode(), id="letters", marks=pytest.mark.slow),
        pytest.param(b"\xff\xfe", id="no-text"),
    ],
)
def test_an_output_is_named_as_it_was_said(tmp_path, locale, name):
    make = [b"generate", b"demo", b"--steps", b"1", b"--prompt", "ein gr\u00fcner Kreis".encode(), b"--out"]
    done = run([*make, name + b".png", b"--json"], tmp_path, locale)
    assert done.returncode == 0, done.stderr
    assert os.listdir(os.fsencode(tmp_path)) == [name + b".png"]
    assert json.loads(done.stdout)["prompt"] == "ein gr\u00fcner Kreis"
    assert run([*make, name + b".png"], tmp_path, locale).returncode == 0
    missing = run([b"inspect", name], tmp_path, locale)
    assert missing.returncode == 2 and missing.stderr.count(b"\n") == 1


@pytest.mark.parametrize("locale", [ASCII, UTF8], ids=["ascii", "utf-8"])
def test_a_recipe_names_its_files_in_utf_8(tmp_path, locale):
    (tmp_path / "gr\u00fcn.txt").write_text("", encoding="utf-8")
    (tmp_path / "r.yaml").write_text("model: demo\nprompts: gr\u00fcn.txt\n", encoding="utf-8")
    script = "from deploy.recipe.recipe import load_recipe; from pathlib import Path; import sys\n"
    script += "sys.exit(not Path(load_recipe(Path('r.yaml')).prompts).is_file())"
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=60).returncode == 0

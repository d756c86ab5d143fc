"""Whether worker processes and commands run our packages, and never a stranger's of the same name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import exporters

ROOT = Path(exporters.__file__).resolve().parents[1]
OTHERS = sorted(Path(sys.base_prefix).parent.glob("3.1[0-3].*/bin/python"))
"""Other Pythons that lie beside this one, without any package: the oldest has no way to leave the directory out."""
PARENT = """
import subprocess, sys
sys.path[:0] = {path!r}
from exporters.process import worker_command
sys.path[:0] = {later!r}
sys.exit(subprocess.run(worker_command({module!r}, "a", "b")).returncode)
"""


@pytest.fixture
def strange(tmp_path) -> Path:
    """A folder with packages called like ours and like what ours use, each of which ends whoever imports it."""
    for name in ("deploy", "exporters", "pydantic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise SystemExit('a stranger: {name}')\n")
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=folder, env=kept | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def module(tmp_path_factory) -> tuple[str, str]:
    """Folder and name of a module whose `main` tells its arguments and which `exporters` it has."""
    folder = tmp_path_factory.mktemp("modules")
    code = "def main(argv):\n    import exporters\n    print(argv, exporters.__file__)\n    return 5\n"
    (folder / "some_worker.py").write_text(code)
    return str(folder), "some_worker"


@pytest.mark.parametrize("python", [Path(sys.executable), *OTHERS], ids=lambda python: python.parts[-3])
@pytest.mark.parametrize("named", [False, True])
def test_a_worker_has_our_packages_and_its_parents_path(strange, module, python, named):
    """Also where the stranger's folder is on the path by name, as it is for a script that lies in it."""
    folder, name = module
    later = [str(strange / "named")] if named else []
    (strange / "named").mkdir()
    shutil.copytree(strange / "exporters", strange / "named" / "exporters")
    code = PARENT.format(path=[str(ROOT), folder], later=later, module=name)
    done = run([str(python), "-c", code], strange)
    assert done.stdout.strip() == f"['a', 'b'] {ROOT / 'exporters' / '__init__.py'}", done.stderr
    assert done.returncode == 5


def test_a_worker_without_its_parent_ends_at_once(monkeypatch, module):
    from exporters.process import worker_command

    monkeypatch.setattr(sys, "path", [*sys.path, module[0]])
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # no process has that number
    done = run(worker_command(module[1]), ROOT)
    assert done.returncode == 1 and not done.stdout and not done.stderr


@pytest.mark.parametrize("package", ["slimdiff", "deploy"])
def test_the_command_runs_by_the_name_of_a_package(strange, package):
    shutil.rmtree(strange / package, ignore_errors=True)  # what is named itself is the stranger's, to Python
    done = run([sys.executable, "-m", package, "--help"], strange, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and "slimdiff demo" in done.stdout, done.stderr


@pytest.mark.parametrize("python", OTHERS, ids=lambda python: python.parts[-3])
def test_the_name_of_the_package_takes_the_working_directory_off_the_path(strange, python):
    (strange / "site" / "deploy" / "cli").mkdir(parents=True)
    (strange / "site" / "deploy" / "__init__.py").touch()
    (strange / "site" / "deploy" / "cli" / "app.py").write_text("def main():\n    print('the command')\n    return 3\n")
    path = os.pathsep.join([str(strange / "site"), str(ROOT)])
    done = run([str(python), "-m", "slimdiff"], strange, PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (3, "the command\n"), done.stderr

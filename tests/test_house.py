"""Who may import whom, and how long a file and a function may be."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("slimdiff", "exporters", "deploy")
SOURCES = [file for folder in (*PACKAGES, "tests", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("importlinter", reason="the contracts of imports need the extra dev")
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(folder / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_run_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("slimdiff/errors.py", "import exporters.layout", "deploy knows exporters"),
        ("slimdiff/algebra/low_rank.py", "import slimdiff.plan", "Rooms of slimdiff"),
        ("exporters/graphs/export.py", "def late():\n    import exporters.engine.key", "Rooms of exporters"),
        ("deploy/bundle/load.py", "import deploy.cli.console", "Rooms of deploy"),
        ("deploy/cli/commands/build.py", "import deploy.build.chain", "Commands do not reach"),
        ("exporters/settings.py", "import torch", "Settings load neither"),
        ("slimdiff/planning/knapsack.py", "import slimdiff.planning.planner", "No two modules"),
    ],
)
def test_an_import_against_the_flow_is_found(module, line, contract, tmp_path):
    for name in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.png")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a") as file:
        file.write(f"\n\n{line}\n")
    done = lint_imports(tmp_path)
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert done.returncode == 1 and any(text.startswith(contract) for text in broken), done.stdout


def test_no_file_is_over_400_lines():
    assert not {f.relative_to(ROOT): n for f in SOURCES if (n := len(f.read_text().splitlines())) > 400}


def test_no_function_is_over_70_lines():
    found = {
        f"{file.relative_to(ROOT)}:{node.name}": length
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (length := node.end_lineno - node.lineno + 1) > 70
    }
    assert not found

"""The command line: help, exit codes, one line per error, and a stdout that holds the result alone."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refused

from deploy import cli
from deploy.cli import console
from deploy.cli.app import COMMANDS, main
from deploy.cli.commands import doctor
from slimdiff.errors import InputError
from slimdiff.progress import bar

ROOT = Path(cli.__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_what_every_command_takes(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "example" in text and f"slimdiff {command}" in text
    assert all(flag in text for flag in ("--json", "-q, --quiet", "-v, --verbose"))


def test_help_loads_none_of_the_libraries():
    """What takes time is what is imported: 0.3 s in all; the bound is for machines that do other things meanwhile."""
    script = (
        "import sys; from deploy.cli.app import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "found = {'torch', 'diffusers', 'transformers', 'pydantic', 'numpy', 'yaml', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(' '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr
    assert all(f"    {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_quiet_or_verbose(command, capsys):
    """Both at once are refused, so both are known; no other argument is looked at before."""
    assert "-v/--verbose: not allowed with argument -q/--quiet" in refused([command, "-q", "-v", "--help"], capsys)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["export", "demo", "--out", "x", "--batch", "0"], "--batch: must be a whole number of at least 1, not '0'"),
        (["compress", "demo", "--out", "x", "--reduce", "5%", "--steps", "0"], "--steps: input should be greater"),
        (["export", "demo", "--out", "x", "--precis", "fp16"], "unrecognized arguments: --precis fp16"),
        (["nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_an_error_in_a_flag_is_all_that_a_process_says(argv, says):
    done = subprocess.run(
        [sys.executable, "-m", "slimdiff", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("slimdiff: error: ") and says in done.stderr


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("slimdiff com", {"compress", "compare"}),
        ("slimdiff compress --stat", {"--statistics"}),
        ("slimdiff export demo --precision ", {"fp32", "fp16", "int8"}),
    ],
)
def test_shells_complete_commands_flags_and_choices(line, offers, tmp_path):
    """As argcomplete's shell function asks: by variables, the answer in a file."""
    pytest.importorskip("argcomplete", reason="argcomplete is of the extra completion")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer"), "PYTHONPATH": str(ROOT)}
    script = "from deploy.cli.app import main; main()"
    subprocess.run([sys.executable, "-c", script], env=os.environ | asked, check=True, timeout=60)
    assert {text.strip() for text in (tmp_path / "answer").read_text().split("\n")} == offers


@pytest.mark.parametrize("module", ["slimdiff", "deploy"])
def test_modules_that_are_the_command(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("slimdiff "), done.stderr


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and all(f"    {command}" in seen.err for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["compress", "demo", "--out", "x"], "one of the arguments --reduce"),
        (["bench", "a", "b", "--rounds", "x"], "--rounds: input should be a valid integer"),
        (["compress", "demo", "--out", "x", "--macs", "5%", "--reduce", "5%"], "not allowed with argument --macs"),
        (["doctor", "--quiet", "--verbose"], "not allowed with argument"),
        (["compress", "demo", "--out", "x", "--macs", "5%", "--sample", "4"], "unrecognized arguments: --sample 4"),
        (["compress", "demo", "--out", "x", "--reduc", "5%"], "one of the arguments --reduce"),
        (["compress", "demo", "--out", "x", "--macs", "5%", "--raw-keys"], "unrecognized arguments: --raw-keys"),
    ],
)
def test_usage_errors_are_one_line(argv, says, capsys):
    assert says in refused(argv, capsys)


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "no space left"),
        (MemoryError(), 2, "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk quota is used up"),
        (OSError(errno.EROFS, "Read-only", "/x/.slim.0123abcd.partial/slim/a"), 2, "/x/slim/a: the file system is"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x"), 2, "/x: is a folder"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by nothing"), 70, "ZeroDivisionError: by nothing (a fault of ours"),
    ],
)
def test_faults_from_below(monkeypatch, capsys, fault, code, says):
    def run(_args):
        raise fault

    monkeypatch.setattr("deploy.cli.commands.doctor.run", run)
    assert says in refused(["doctor"], capsys, code)


def test_a_crash_says_where(monkeypatch, capsys):
    def run(_args):
        raise ZeroDivisionError

    monkeypatch.setattr("deploy.cli.commands.doctor.run", run)
    assert main(["doctor"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_how_much_is_said(monkeypatch, capsys):
    def run(_args):
        for level in ("debug", "info", "warning"):
            getattr(console.log, level)(f"at {level}")
        raise InputError("wrong")

    monkeypatch.setattr("deploy.cli.commands.doctor.run", run)
    for flags, said in (
        (["-q"], {"at warning"}),
        ([], {"at info", "at warning"}),
        (["-v"], {"at debug", "at info", "at warning", "Traceback"}),
    ):
        assert main(["doctor", *flags]) == 2
        err = capsys.readouterr().err
        assert {text for text in ("at debug", "at info", "at warning", "Traceback") if text in err} == said


def test_progress_in_a_log_file_is_a_line_at_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.on_stderr(quiet=False, verbose=False):
        written = sys.stderr
        with bar(range(50), name="images", mininterval=0, miniters=1) as images:
            for _ in images:
                now[0] += 1
        print("after it", file=sys.stderr)
    lines = written.getvalue().splitlines()
    assert len(lines) == 6 and lines[-1] == "after it"
    assert all(line.startswith("images") for line in lines[:-1]) and "\r" not in written.getvalue()


def test_a_bar_inside_a_bar_leaves_no_marks_in_a_log_file(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with console.on_stderr(quiet=False, verbose=False):
        for _ in bar(range(5), name="tables", mininterval=0, miniters=1):
            for _ in bar(range(5), name="graphs", mininterval=0, miniters=1):
                now[0] += 3
        print("after", "it", file=sys.stderr)
    lines = written.getvalue().splitlines()
    assert lines[-1] == "after it" and {line[:6] for line in lines[:-1]} <= {"tables", "graphs"} and len(lines) > 4


def test_quiet_shows_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    with console.on_stderr(quiet=True, verbose=False):
        list(bar(range(3), name="images"))
    assert written.getvalue() == ""


def test_a_missing_package_exits_3(monkeypatch, tmp_path, workspace, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refused(["export", workspace / "tiny", "--out", tmp_path / "out"], capsys, 3)
    assert "pip install 'slimdiff[onnx]'" in line


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    torch = next(r for r in found["runtimes"] if r["name"] == "torch")
    assert torch["installed"] and found["machine"]["cpus"] >= 1
    assert all(r["installed"] or "pip install" in r["needs"] for r in found["runtimes"])
    here = {name: importlib.util.find_spec(name) for name in doctor.PACKAGES}
    assert found["imported_from"] == {name: str(Path(s.origin).parent) for name, s in here.items() if s and s.origin}
    assert Path(found["imported_from"]["deploy"]) == ROOT / "deploy" and "torch" in found["imported_from"]
    assert main(["doctor"]) == 0
    seen = capsys.readouterr()
    assert "onnxruntime" in seen.out and "doctor: looking" in seen.err

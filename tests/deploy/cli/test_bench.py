"""`slimdiff bench` as users and CI systems run it, on tiny graphs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import deploy
from deploy.cli.app import main, make_parser
from deploy.cli.commands.bench import gate_of
from deploy.history import summary

pytest.importorskip("onnxscript", reason="graphs are exported first")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
pytest.importorskip("ruptures", reason="change points need the extra history")

ROOT = Path(deploy.__file__).parents[1]
CI = ROOT / "deploy" / "ci"


@pytest.fixture(scope="module")
def measured(exported, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with what a bench left, and its result."""
    folder, out = tmp_path_factory.mktemp("measured"), io.StringIO()
    argv = ["bench", exported, exported, "--tolerance", "90%", "--processes", "3", "--rounds", "3", "--json", "--quiet"]
    argv += ["--history", folder / "h.jsonl", "--label", "abc", "--junit", folder / "j.xml"]
    with contextlib.redirect_stdout(out):
        code = main([*map(str, argv), "--markdown", str(folder / "m.md"), "--plot", str(folder / "p.svg")])
    value = json.loads(out.getvalue())
    assert code == {"pass": 0, "inconclusive": 4}[value["verdict"]]
    return folder, value


def test_the_result_is_what_the_contract_says(measured):
    value = measured[1]
    assert {"verdict", "speedup", "baseline", "candidate", "runtime", "machine"} <= set(value)
    assert value["gate"] == "latency<=1.9"
    assert value["speedup"]["low"] <= value["speedup"]["median"] <= value["speedup"]["high"]
    for side in (value["baseline"], value["candidate"]):
        assert 0 < side["median_ms"] <= side["p90_ms"] <= side["p95_ms"] <= side["p99_ms"]
        assert side["calls_per_second"] > 0 and side["load_ms"] > 0 and side["first_run_ms"] > 0
    assert value["process_pairs"] == len(value["log_ratios"]) == 3 and value["fingerprint"]["id"]


def test_history_junit_markdown_and_plot_are_left(measured, exported):
    folder, value = measured
    assert {p.name for p in folder.iterdir()} == {"h.jsonl", "j.xml", "m.md", "p.svg"}
    line = json.loads((folder / "h.jsonl").read_text())
    assert line["label"] == "abc" and {k: line[k] for k in value} == value
    case = ElementTree.parse(folder / "j.xml").getroot().find("testsuite/testcase")
    assert case.get("name") == f"{exported} against {exported}: latency<=1.9" and case.find("failure") is None
    assert len(ElementTree.parse(folder / "p.svg").findall(".//{http://www.w3.org/2000/svg}circle")) == 1
    assert "| peak memory |" in (folder / "m.md").read_text()


@pytest.mark.parametrize(("verdict", "child"), [("pass", None), ("fail", "failure"), ("inconclusive", "skipped")])
def test_verdicts_in_junit(measured, tmp_path, verdict, child):
    case = summary.case_of(measured[1] | {"verdict": verdict})
    summary.write_junit([case, case], tmp_path / "x.xml")
    suite = ElementTree.parse(tmp_path / "x.xml").getroot().find("testsuite")
    assert suite.get("tests") == "2" and {t.tag for t in suite[0]} == {child, "system-out"} - {None}
    assert suite.get("failures") == ("2" if verdict == "fail" else "0")
    assert verdict in summary.markdown(measured[1] | {"verdict": verdict})


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["bench"], "name BASE and CANDIDATE"),
        (["bench", "a"], "name BASE and CANDIDATE"),
        (["bench", "a", "b", "--plot", "x.svg"], "say with --history which"),
        (["bench", "a", "b", "--tolerance", "five"], "--tolerance is like 5%"),
        (["bench", "a", "b", "--tolerance=-5%"], "--tolerance is like 5%"),
        (["bench", "a", "b", "--processes", "1"], "--processes"),
        (["bench", "a", "b", "--max-seconds", "0"], "--max-seconds"),
        (["bench", "--history", "h", "--last", "0"], "--last"),
        (["bench", "demo", "demo", "--schedule", "none"], "--schedule is of a whole image, and a call is timed"),
        (["bench", "demo", "demo", "--steps", "3"], "give --of image with it"),
        (["bench", "demo", "demo", "--of", "image", "--base-schedule", "absent.json"], "no schedule can be read there"),
    ],
)
def test_bad_usage(argv, says, capsys):
    assert main(argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tolerance", "gate"), [("5%", "latency<=1.05"), ("0.03", "latency<=1.03"), ("0", "latency<=1")]
)
def test_a_tolerance_is_a_gate(tolerance, gate):
    assert str(gate_of(make_parser().parse_args(["bench", "a", "b", "--tolerance", tolerance]))) == gate


def steps(workflow: str) -> list[tuple[str, dict[str, str]]]:
    """The scripts of a workflow's steps that run slimdiff, with the variables that they see."""
    content = yaml.safe_load((CI / workflow).read_text())
    if workflow == "github.yml":
        job = content["jobs"]["latency"]
        scripts = [step["run"] for step in job["steps"] if "run" in step]
        variables = job["env"]
    else:
        job = content["latency"]
        scripts, variables = [*job["script"], *job["after_script"]], job["variables"]
        assert job["allow_failure"]["exit_codes"] == 4
    return [(script, variables) for script in scripts if "slimdiff bench" in script]


@pytest.mark.parametrize("workflow", ["github.yml", pytest.param("gitlab.yml", marks=pytest.mark.slow)])
def test_the_steps_of_the_workflows(workflow, exported, tmp_path):
    """As a shell runs them, with a tiny model and a second to measure: too little for a verdict."""
    scripts = steps(workflow)
    assert len(scripts) == 2
    (tmp_path / "released").symlink_to(exported)
    (tmp_path / "candidate").symlink_to(exported)
    given = {"GITHUB_SHA": "abc", "CI_COMMIT_SHA": "abc", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    for (script, variables), codes in zip(scripts, ({0, 4}, {0}), strict=True):
        environment = os.environ | variables | given | {"MAX_SECONDS": "1", "PYTHONPATH": str(ROOT)}
        script = f'slimdiff() {{ {shlex.quote(sys.executable)} -m slimdiff "$@"; }}\n{script}'
        done = subprocess.run(
            ["bash", "-e", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode in codes, done.stderr
    assert json.loads((tmp_path / "latency.jsonl").read_text())["label"] == "abc"
    assert {"latency.md", "latency.svg", "latency.xml", "trend.md"} <= {p.name for p in tmp_path.iterdir()}
    if workflow == "github.yml":
        assert "### " in (tmp_path / "summary.md").read_text()


def test_the_pages_commands_are_commands():
    page = (ROOT / "docs" / "gate-latency-in-ci.md").read_text()
    blocks = page.split("```console\n")[1:]
    commands = [line for block in blocks for line in block.split("```")[0].splitlines() if line]
    assert len(commands) == 4
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])

"""The history of a bench: what is appended, what is compared, where it changed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from deploy.cli.app import main
from deploy.history import results
from deploy.report import trend
from slimdiff.errors import InputError

pytest.importorskip("ruptures", reason="change points need the extra history")
from deploy.history.change_points import change_points  # noqa: E402


def result(ratio: float = 1.0, ms: float = 10.0, machine: str = "a", **changes) -> dict:
    """What `exporters.latency.measure.bench` gives, as far as a history reads it; 1 % interval to either side."""
    return {
        "verdict": "pass",
        "gate": "latency<=1.05",
        "speedup": {"median": 1 / ratio, "low": 0.99 / ratio, "high": 1.01 / ratio},
        "baseline": {"name": "released", "median_ms": ms},
        "candidate": {"name": "candidate", "median_ms": ms * ratio},
        "runtimes": {"baseline": "onnxruntime", "candidate": "onnxruntime"},
        "threads": 1,
        "machine": f"machine {machine}",
        "fingerprint": {"id": machine},
        **changes,
    }


def write(file: Path, ratios, **changes) -> Path:
    for i, ratio in enumerate(ratios):
        results.append(file, result(float(ratio), **changes), label=f"commit-{i}")
    return file


def noisy(seed: int, *levels: tuple[int, float], scatter: float = 0.005) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.concatenate([level * np.exp(scatter * generator.standard_normal(n)) for n, level in levels])


def shown(argv: list, capsys, code: int = 0) -> dict:
    assert main([*map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_what_is_appended_is_read(tmp_path):
    file = write(tmp_path / "new" / "h.jsonl", [1.0, 1.1])
    entries, skipped = results.read(file)
    assert [e.title for e in entries] == ["commit-0", "commit-1"] and skipped == 0
    assert [e.value("ratio") for e in entries] == pytest.approx([1.0, 1.1])
    assert [e.value("milliseconds") for e in entries] == pytest.approx([10, 11])


def test_a_torn_line_costs_itself_alone(tmp_path):
    file = write(tmp_path / "h.jsonl", [1.0, 1.1])
    file.write_bytes(file.read_bytes()[:-30])
    write(file, [1.2])
    entries, skipped = results.read(file)
    assert [round(e.value("ratio"), 3) for e in entries] == [1.0, 1.2] and skipped == 1


def _append_many(file: Path, ratio: float) -> None:
    for _ in range(100):
        results.append(file, result(ratio), label="x" * 5000)


def test_two_processes_append_at_once(tmp_path):
    file = tmp_path / "h.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(file, ratio)) for ratio in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    entries, skipped = results.read(file)
    assert skipped == 0 and len(entries) == 200


@pytest.mark.parametrize("content", [None, "", "no json\n", '{"schema": 1}\n', '{"schema": 9}\n'])
def test_what_is_no_history_is_refused(tmp_path, content, capsys):
    file = tmp_path / "h.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["bench", "--history", str(file)]) == 2
    assert "slimdiff bench" in capsys.readouterr().err


def test_a_folder_is_no_history(tmp_path, capsys):
    assert main(["bench", "demo", "demo", "--history", str(tmp_path)]) == 2
    assert "is a folder: name a file" in capsys.readouterr().err
    with pytest.raises(InputError, match="name a file"):
        results.append(tmp_path, result())


def test_machines_are_not_compared_unless_told(tmp_path, capsys):
    file = write(tmp_path / "h.jsonl", [1.0] * 4)
    write(file, [1.5] * 4, machine="b")
    apart = shown(["bench", "--history", file], capsys)
    assert [(s["machine"], len(s["results"]), s["changes"]) for s in apart["series"]] == [
        ("machine a", 4, []),
        ("machine b", 4, []),
    ]
    together = shown(["bench", "--history", file, "--across-machines"], capsys)["series"]
    assert len(together) == 1 and together[0]["changes"] == [4]
    assert together[0]["machine"] == "machine a and machine b"


@pytest.mark.parametrize(
    "changes",
    [
        {"threads": 2},
        {"baseline": {"name": "x", "median_ms": 1}},
        {"runtimes": {"baseline": "torch"} | {"candidate": "torch"}},
    ],
)
def test_other_things_are_other_series(tmp_path, changes):
    file = write(tmp_path / "h.jsonl", [1.0, 1.0])
    write(file, [1.0], **changes)
    assert sorted(len(s.entries) for s in results.all_series(results.read(file)[0])) == [1, 2]


@pytest.mark.parametrize("at", [4, 10, 16])
@pytest.mark.parametrize("step", [1.03, 0.95])
def test_a_change_of_level_is_found_where_it_is(at, step):
    for seed in range(10):
        found = change_points(noisy(seed, (at, 1.0), (20 - at, step)), [0.003] * 20)
        assert len(found) >= 1 and min(abs(i - at) for i in found) <= 1


def test_noise_and_outliers_are_no_change():
    """At most 3 in 100 series of 40 results, some with an outlier, show a change that is not there."""
    false = 0
    for seed in range(100):
        values = noisy(seed, (40, 1.0))
        if seed % 2:
            values[seed % 40] *= 1.03
        false += bool(change_points(values, [0.003] * 40))
    assert false <= 3


@pytest.mark.parametrize("values", [[1.0], [1.0] * 5, [1.0, 2.0, 1.0, 2.0, 1.0], [3.0] * 30])
def test_few_or_equal_values_have_no_change(values):
    assert change_points(values, [0.0] * len(values)) == []


def test_creep_is_caught_though_each_step_passed(tmp_path, capsys):
    ratios = noisy(1, (8, 1.0), (8, 1.03), (8, 1.06), (8, 1.09), scatter=0.003)
    file = write(tmp_path / "h.jsonl", ratios)
    value = shown(["bench", "--history", file, "--tolerance", "5%"], capsys, 1)
    assert value["verdict"] == "fail" and value["series"][0]["above_fastest"] == pytest.approx(0.09, abs=0.01)
    assert [abs(i - at) <= 1 for i, at in zip(value["series"][0]["changes"], (8, 16, 24), strict=True)]
    assert shown(["bench", "--history", file], capsys)["verdict"] == "pass"
    assert shown(["bench", "--history", file, "--tolerance", "5%", "--last", "8"], capsys)["verdict"] == "pass"


def test_the_trend_in_every_form(tmp_path, capsys):
    file = write(tmp_path / "h.jsonl", noisy(0, (15, 1.0), (15, 1.1)))
    forms = {name: tmp_path / f"trend.{name}" for name in ("svg", "md", "xml")}
    argv = ["bench", "--history", file, "--plot", forms["svg"], "--markdown", forms["md"], "--junit", forms["xml"]]
    assert main([*map(str, argv), "--tolerance", "5%"]) == 1
    text = capsys.readouterr().out
    assert "slower by 1" in text and "since commit-15" in text and "10 earlier results" in text
    assert "slower by 1" in forms["md"].read_text() and "| commit-29 |" in forms["md"].read_text()
    suite = ElementTree.parse(forms["xml"]).getroot().find("testsuite")
    assert suite.get("failures") == "1" and "above its fastest" in suite.find("testcase/failure").get("message")
    drawn = ElementTree.parse(forms["svg"]).getroot()
    dots = drawn.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 30
    heights = [float(dot.get("cy")) for dot in dots]
    assert min(heights[:15]) > max(heights[15:]) and min(heights) >= 0 and max(heights) <= trend._HEIGHT


def test_milliseconds_can_be_followed(tmp_path, capsys):
    file = write(tmp_path / "h.jsonl", [1.0] * 6, ms=10.0)
    write(file, [1.0] * 6, ms=12.0)
    assert shown(["bench", "--history", file], capsys)["series"][0]["changes"] == []
    assert shown(["bench", "--history", file, "--trend", "milliseconds"], capsys)["series"][0]["changes"] == [6]

"""A bench's result for people and for CI systems: text, Markdown, JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from deploy.artifacts.numbers import size
from slimdiff.storage.manifest import replacing

_MARK = {"pass": "✓", "fail": "✕", "inconclusive": "?"}


@dataclass(frozen=True)
class Case:
    """What JUnit calls a test."""

    name: str
    verdict: str
    """`pass`, `fail` or `inconclusive`, for which JUnit has no word: it says skipped."""
    message: str
    detail: str
    seconds: float = 0.0


def verdict_line(value: Mapping[str, Any]) -> str:
    """`latency<=1.05: fail, 1.071 (1.062 to 1.080)`."""
    speedup = value["speedup"]
    latency = f"{1 / speedup['median']:.3f} ({1 / speedup['high']:.3f} to {1 / speedup['low']:.3f})"
    return f"{value['gate']}: {value['verdict']}, latency {latency}" if value["gate"] else f"no gate, latency {latency}"


def text(value: Mapping[str, Any]) -> str:
    """What the command prints."""
    return "\n".join(
        [
            *(f"{name:<12}{base:>12}{candidate:>12}" for name, base, candidate in _rows(value)),
            f"speedup     {_speedup(value)}",
            f"{value['process_pairs']} process pairs, {100 * value['scatter']:.1f} % scatter, {value['seconds']:.0f} s",
            f"{value['runtime']} on {value['machine']}",
            *(f"schedule of the {side}: {own['says']}" for side, own in _schedules(value)),
            *(f"note: {hint}" for hint in value["hints"]),
            f"gate {value['gate']}: {value['verdict']}" if value["gate"] else "no gate",
        ]
    )


def markdown(value: Mapping[str, Any]) -> str:
    """A section for a CI system's summary."""
    head, *rows = _rows(value)
    return "\n".join(
        [
            f"### {_MARK[value['verdict']]} {verdict_line(value)}",
            "",
            f"| {head[0]} | {head[1]} | {head[2]} |",
            "| --- | ---: | ---: |",
            *(f"| {name} | {base} | {candidate} |" for name, base, candidate in rows),
            "",
            f"Speedup {_speedup(value)}, of {value['process_pairs']} process pairs in {value['seconds']:.0f} s. "
            f"{value['runtime']} on {value['machine']}.",
            *(f"\nSchedule of the {side}: {own['says']}." for side, own in _schedules(value)),
            *(f"\n> {hint}" for hint in value["hints"]),
            "",
        ]
    )


def case_of(value: Mapping[str, Any]) -> Case:
    """A result as a test."""
    what = "whole image, " if value.get("of") == "image" else ""
    name = f"{what}{value['candidate']['name']} against {value['baseline']['name']}"
    return Case(
        f"{name}: {value['gate'] or 'no gate'}", value["verdict"], verdict_line(value), text(value), value["seconds"]
    )


def write_junit(cases: Sequence[Case], file: Path) -> None:
    """Write tests as JUnit XML, in the form that GitHub's and GitLab's reporters read."""
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.verdict == "fail" for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.verdict == "inconclusive" for case in cases)),
        "time": f"{sum(case.seconds for case in cases):.3f}",
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "slimdiff bench", **counts})
    for case in cases:
        attributes = {"classname": "slimdiff.bench", "name": case.name, "time": f"{case.seconds:.3f}"}
        test = ElementTree.SubElement(suite, "testcase", attributes)
        if case.verdict == "fail":
            ElementTree.SubElement(test, "failure", {"message": case.message}).text = case.detail
        elif case.verdict == "inconclusive":
            ElementTree.SubElement(test, "skipped", {"message": f"inconclusive: {case.message}"})
        ElementTree.SubElement(test, "system-out").text = case.detail
    ElementTree.indent(root)
    write_text("<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(root, encoding="unicode"), file)


def write_text(content: str, file: Path) -> None:
    """Write a text file, whole or not at all."""
    with replacing(file, is_file=True) as temporary:
        temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # names may be no text


def _schedules(value: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """By side, those that images were made by."""
    return [(side, own) for side in ("baseline", "candidate") if (own := value[side].get("schedule"))]


def _speedup(value: Mapping[str, Any]) -> str:
    low, median, high = (value["speedup"][key] for key in ("low", "median", "high"))
    return f"{median:.3f}x, {100 * value['confidence']:g} % interval {low:.3f} to {high:.3f}"


def _rows(value: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    sides = value["baseline"], value["candidate"]

    def row(name: str, key: str, unit: str = "ms") -> tuple[str, str, str]:
        shown = [f"{side[key]:.2f} {unit}".rstrip() for side in sides]
        return name, shown[0], shown[1]

    peaks = [side["peak_memory_bytes"] for side in sides]
    memory = [size(peak) if peak is not None else "unknown" for peak in peaks]
    return [
        ("", "baseline", "candidate"),
        *(row(f"p{share}", f"p{share}_ms") for share in (50, 90, 95, 99)),
        row("runs / s" if value.get("of") == "image" else "calls / s", "calls_per_second", ""),
        ("peak memory", memory[0], memory[1]),
        row("load", "load_ms"),
        row("first run", "first_run_ms"),
    ]

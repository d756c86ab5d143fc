"""The trend of a history for people: a table, Markdown for a CI system's summary, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy.history.results import Series
from deploy.report.page import write_page
from deploy.report.plots import Tick, line, linear_scale

SHOWN = 20
"""Results in a table; the plot has them all."""
_WIDTH, _HEIGHT = 640, 200


def heading(series: Series) -> str:
    """What was timed, if that is no call; the candidate, the baseline, the runtime and the machine."""
    what = "whole image, " if series.entries[-1].of == "image" else ""
    return f"{what}{series.candidate} against {series.baseline}, {series.runtime}, {series.machine}"


def changes(series: Series) -> list[str]:
    """One line for each change of level, the newest first."""
    lines = []
    for before, after in pairwise(series.levels):
        moved = after.value / before.value - 1
        first = series.entries[after.start].title
        lines.append(f"{'slower' if moved > 0 else 'faster'} by {abs(moved):.1%} since {first}")
    return lines[::-1]


def text(all_series: Sequence[Series], skipped: int) -> str:
    """All series as tables of text."""
    blocks = []
    for series in all_series:
        table = [_HEAD, *_rows(series)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        blocks.append("\n".join([heading(series), *_left_out(series), *lines, *(changes(series) or ["no change"])]))
    return "\n\n".join([*blocks, *_skipped(skipped)])


def markdown(all_series: Sequence[Series], skipped: int) -> str:
    """All series as Markdown."""
    blocks = []
    for series in all_series:
        table = [_HEAD, ["---"] * len(_HEAD), *_rows(series)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        moves = [f"- {change}" for change in changes(series)] or ["No change of level."]
        blocks.append("\n".join([f"### {heading(series)}", "", *moves, "", *_left_out(series), *lines]))
    return "\n\n".join([*blocks, *_skipped(skipped)]) + "\n"


_HEAD = ["result", "candidate ms", "latency", "interval", "verdict", ""]


def _rows(series: Series) -> list[list[str]]:
    """The cells of the results that a table shows."""
    starts = {level.start for level in series.levels[1:]}
    return [
        [
            entry.title,
            f"{entry.milliseconds:.2f}",
            f"{1 / entry.speedup:.3f}",
            "{:.3f} to {:.3f}".format(*entry.bounds("ratio")),
            entry.verdict if entry.gate else "no gate",
            "changed" if i in starts else "",
        ]
        for i, entry in list(enumerate(series.entries))[-SHOWN:]
    ]


def _left_out(series: Series) -> list[str]:
    more = len(series.entries) - SHOWN
    return [f"({more} earlier results are not shown)", ""] if more > 0 else []


def _skipped(skipped: int) -> list[str]:
    return [f"{skipped} damaged lines were left out"] if skipped else []


def write_plot(all_series: Sequence[Series], file: Path) -> None:
    """Write all series as one SVG file."""
    plots = [_plot(series, 60 + index * (_HEIGHT + 90)) for index, series in enumerate(all_series)]
    total = len(plots) * (_HEIGHT + 90) + 20
    write_page("history.svg.j2", file, plots=plots, width=_WIDTH, height=_HEIGHT, total=total)


def _plot(series: Series, top: int) -> dict[str, Any]:
    """One series, in pixels of a field that is `_WIDTH` by `_HEIGHT`."""
    ends = [entry.bounds(series.trend) for entry in series.entries]
    scale = linear_scale(value for pair in ends for value in pair)
    step = _WIDTH / len(series.entries)

    def x(index: float) -> float:
        return round(step * (index + 0.5), 1)

    def y(value: float) -> float:
        return round(_HEIGHT * (1 - scale.at(value) / 100), 1)

    corners = [
        (x(index), y(level.value))
        for level in series.levels
        for index in (level.start - 0.5 * (level.start > 0), level.end - 1 + 0.5 * (level.end < len(series.entries)))
    ]
    values = [entry.value(series.trend) for entry in series.entries]
    return {
        "title": heading(series),
        "axis": "candidate's time / baseline's" if series.trend == "ratio" else "candidate, ms",
        "top": top,
        "dots": [
            (x(i), y(value), f"{entry.title}: {value:.3f}", entry.verdict)
            for i, (entry, value) in enumerate(zip(series.entries, values, strict=True))
        ],
        "spans": [(x(i), y(high), y(low)) for i, (low, high) in enumerate(ends) if high > low],
        "levels": [line(corners)],
        "ticks": [Tick(round(_HEIGHT * (1 - tick.at / 100), 1), tick.label) for tick in scale.ticks()],
    }

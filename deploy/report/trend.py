"""The trend of a history for people: a table, Markdown for a CI system's summary, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from deploy.history.results import Entry, Series
from deploy.report.page import write_page
from deploy.report.plots import Tick, line, linear_scale

SHOWN = 20
"""Results in a table; the plot has them all."""
_WIDTH, _HEIGHT = 640, 200


def heading(series: Series) -> str:
    """What is compared with what, where."""
    return f"{series.candidate} against {series.baseline}, {series.runtime}, {series.machine}"


def changes(series: Series) -> list[str]:
    """One line for each change of level, the newest first."""
    told = []
    for before, after in pairwise(series.levels):
        moved = after.value / before.value - 1
        first = series.entries[after.start].title
        told.append(f"{'slower' if moved > 0 else 'faster'} by {abs(moved):.1%} since {first}")
    return told[::-1]


def text(all_series: Sequence[Series], skipped: int) -> str:
    """All series as tables of text."""
    blocks = []
    for series in all_series:
        rows = [_cells(entry, _starts_level(series, i)) for i, entry in _shown(series)]
        table = [_HEAD, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEAD))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        blocks.append("\n".join([heading(series), *_left_out(series), *lines, *(changes(series) or ["no change"])]))
    return "\n\n".join([*blocks, *_skipped(skipped)])


def markdown(all_series: Sequence[Series], skipped: int) -> str:
    """All series as Markdown."""
    blocks = []
    for series in all_series:
        rows = [_cells(entry, _starts_level(series, i)) for i, entry in _shown(series)]
        table = [_HEAD, ["---"] * len(_HEAD), *rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        told = [f"- {change}" for change in changes(series)] or ["No change of level."]
        blocks.append("\n".join([f"### {heading(series)}", "", *told, "", *_left_out(series), *lines]))
    return "\n\n".join([*blocks, *_skipped(skipped)]) + "\n"


_HEAD = ["result", "candidate ms", "latency", "interval", "verdict", ""]


def _cells(entry: Entry, starts_level: bool) -> list[str]:
    speedup = entry.speedup
    return [
        entry.title,
        f"{entry.candidate.median_ms:.2f}",
        f"{1 / speedup.median:.3f}",
        f"{1 / speedup.high:.3f} to {1 / speedup.low:.3f}",
        entry.verdict if entry.gate else "no gate",
        "changed" if starts_level else "",
    ]


def _starts_level(series: Series, index: int) -> bool:
    return index in {level.start for level in series.levels[1:]}


def _shown(series: Series) -> list[tuple[int, Entry]]:
    return list(enumerate(series.entries))[-SHOWN:]


def _left_out(series: Series) -> list[str]:
    more = len(series.entries) - SHOWN
    return [f"({more} earlier results are not shown)", ""] if more > 0 else []


def _skipped(skipped: int) -> list[str]:
    return [f"{skipped} damaged lines were left out"] if skipped else []


@dataclass(frozen=True)
class Plot:
    """One series, in pixels of a field that is `_WIDTH` by `_HEIGHT`."""

    title: str
    axis: str
    top: int
    dots: list[tuple[float, float, str, str]]
    """Place, text and verdict of each result."""
    spans: list[tuple[float, float, float]]
    """Place, upper and lower end of each result's interval."""
    levels: list[str]
    """Paths of the levels, joined at the changes."""
    ticks: list[Tick]


def write_plot(all_series: Sequence[Series], file: Path) -> None:
    """Write all series as one SVG file."""
    plots = [_plot(series, 60 + index * (_HEIGHT + 90)) for index, series in enumerate(all_series)]
    total = len(plots) * (_HEIGHT + 90) + 20
    write_page("history.svg.j2", file, plots=plots, width=_WIDTH, height=_HEIGHT, total=total)


def _plot(series: Series, top: int) -> Plot:
    ends = [_ends(series, entry) for entry in series.entries]
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
    return Plot(
        title=heading(series),
        axis="candidate's time / baseline's" if series.trend == "ratio" else "candidate, ms",
        top=top,
        dots=[
            (x(i), y(e.value(series.trend)), f"{e.title}: {e.value(series.trend):.3f}", e.verdict)
            for i, e in enumerate(series.entries)
        ],
        spans=[(x(i), y(high), y(low)) for i, (low, high) in enumerate(ends) if high > low],
        levels=[line(corners)],
        ticks=[Tick(round(_HEIGHT * (1 - tick.at / 100), 1), tick.label) for tick in scale.ticks()],
    )


def _ends(series: Series, entry: Entry) -> tuple[float, float]:
    if series.trend == "ratio":
        return 1 / entry.speedup.high, 1 / entry.speedup.low
    return entry.candidate.median_ms, entry.candidate.median_ms

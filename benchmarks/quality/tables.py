"""Tables of what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.methods import METHODS

Row = dict[str, Any]


def _points(lost: dict[str, float]) -> str:
    return f"{lost['points']:+.1f} ({lost['low']:+.1f} to {lost['high']:+.1f})"


def quality_table(dense: Row, rows: list[Row]) -> str:
    """One line per method and cut, with the columns that there are figures for."""
    timed, distance = any("speedup" in row for row in rows), dense.get("frechet_distance") is not None
    heads = ["method", "size", "UNet parameters", "MACs per sample", "noise-prediction error", "PSNR to dense"]
    heads += ["caption accuracy", "points lost (95 %)"]
    heads += ["Fréchet"] * distance + ["ONNX Runtime speedup (95 %)"] * timed
    first = ["dense", "100 %", f"{dense['parameters'] / 1e6:.2f} M", f"{dense['macs'] / 1e6:.0f} M", "0", "-"]
    first += [f"{dense['caption_accuracy']:.1%}", "0"]
    first += [f"{dense['frechet_distance']:.3f}"] if distance else []
    first += ["1"] * timed
    lines = [heads, ["---"] * len(heads), first]
    for row in rows:
        line = [METHODS[row["method"]].label, row["cut"], f"{row['parameters'] / 1e6:.2f} M"]
        line += [f"{row['macs'] / 1e6:.0f} M", f"{row['noise_error']:.1e}", f"{row['psnr_db']:.1f} dB"]
        line += [f"{row['caption_accuracy']:.1%}", _points(row["points_lost"])]
        line += [f"{row['frechet_distance']:.3f}"] if distance else []
        speed = row.get("speedup")
        line += [f"{speed['median']:.2f} ({speed['low']:.2f} to {speed['high']:.2f})" if speed else "-"] * timed
        lines.append(line)
    return _table(lines)


def accuracy_table(dense: Row, rows: list[Row], sharpest: str) -> str:
    """What the judge reads of each attribute; the points lost are those of the sharpest one."""
    names = list(dense["accuracy"])
    lines = [["method", "size", *names, f"points of {sharpest} lost (95 %)"], ["---"] * (len(names) + 3)]
    for row in [dense | {"cut": "100 %"}, *rows]:
        label = METHODS[row["method"]].label if "method" in row else "dense"
        lost = _points(row["sharpest_lost"]) if "sharpest_lost" in row else "0"
        lines.append([label, row["cut"], *(f"{row['accuracy'][name]:.1%}" for name in names), lost])
    return _table(lines)


FIGURES = {
    "noise-prediction error": lambda row: f"{row['noise_error']:.1e}",
    "predicted / measured error": lambda row: (
        f"{row['predicted_error'] / row['noise_error']:.2f}" if row.get("predicted_error") else "-"
    ),
    "PSNR to dense, dB": lambda row: f"{row['psnr_db']:.1f}",
    "caption accuracy (dense {caption_accuracy:.1%})": lambda row: f"{row['caption_accuracy']:.1%}",
    "Fréchet distance (dense {frechet_distance:.2f})": lambda row: f"{row['frechet_distance']:.2f}",
    "seconds to slim": lambda row: f"{row['seconds']:.1f}",
}


def ablation_tables(dense: Row, rows: list[Row]) -> str:
    """One table per figure: methods down, cuts across."""
    cuts = list(dict.fromkeys(row["cut"] for row in rows))
    cells = {(row["method"], row["cut"]): row for row in rows}
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    tables = []
    for title, show in FIGURES.items():
        if "frechet" in title and dense.get("frechet_distance") is None:
            continue
        lines = [[title.format(**dense), *cuts], ["---"] * (len(cuts) + 1)]
        for name in methods:
            shown = (show(cells[name, cut]) if (name, cut) in cells else "-" for cut in cuts)
            lines.append([METHODS[name].label, *shown])
        tables.append(_table(lines))
    return "\n\n".join(tables)


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""The report of a build: one HTML file that needs nothing else, for the person who decides whether to deploy."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder as layout
from deploy.artifacts import numbers
from deploy.report.frontier import frontier_charts
from deploy.report.plots import Scale, Tick, line, linear_scale, log_scale, place
from slimdiff.errors import InputError
from slimdiff.storage.manifest import replacing

TEMPLATES = Path(__file__).parent / "templates"
INLINE_BYTES = 200_000
"""Larger images are embedded as WebP, so that 24 images of 1024 pixels do not make a report of 50 MB."""
_SMOOTH_FROM = 200  # pixels: smaller images are scaled up with their pixels shown
_SHORT_TABLE = 8  # rows: longer tables are folded away under their worst rows


@dataclass(frozen=True)
class Figure:
    """One of the four figures."""

    name: str
    note: str
    """What exactly is counted."""
    dense: str = ""
    slim: str = ""
    exact: str = ""
    """Every digit, shown on hover."""
    share: float = 0.0
    """slim / dense."""
    change: str = ""
    interval: str = ""
    doubt: str = ""
    """Why the change is not to be relied on."""
    missing: str = ""
    """Why there is no such figure."""


@dataclass(frozen=True)
class Row:
    """One site of the plot."""

    prefix: str
    """What the site's name begins with, up to its module."""
    leaf: str
    """The rest of it: `attn1.query_key`."""
    group: str
    rank: str
    title: str
    share: float
    error: str
    error_at: float | None
    sensitivity: str
    sensitivity_at: float | None


@dataclass(frozen=True)
class GroupTotal:
    """What the sites of one group have in common."""

    group: str
    sites: int
    share: str
    error: str


@dataclass(frozen=True)
class Sites:
    """Ranks and errors, by the module that sites sit in."""

    blocks: dict[str, list[Row]]
    totals: list[GroupTotal]
    error_name: str
    error_scale: Scale | None
    sensitivity_scale: Scale | None
    shown: int
    unasked: int


@dataclass(frozen=True)
class NoiseChart:
    """The noise-prediction error over timesteps."""

    path: str
    points: list[tuple[float, float, str]]
    """Place and text of each."""
    rows: list[tuple[str, str]]
    x: list[Tick]
    y: list[Tick]
    overall: float | None
    """Height of the error over all timesteps."""
    bound: float | None
    """Height of the gate."""
    summary: str


@dataclass(frozen=True)
class Speedup:
    """The interval of the speedup on its axis."""

    low: float
    median: float
    high: float
    same: float
    bound: float | None
    ticks: list[Tick]


@dataclass(frozen=True)
class Picture:
    """Images of one caption and seed."""

    caption: str
    seed: str
    images: list[tuple[str, str]]
    """Label and data URI, or an empty URI where there is no such image."""
    width: int
    height: int


@dataclass(frozen=True)
class Parity:
    """One comparison of two runs of the same model."""

    name: str
    precision: str
    passed: bool
    first_diverging: str | None
    checks: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    """The check closest to its bound, or furthest beyond it, of each metric; empty if `checks` is short."""


def write_report(build_folder: Path, out_file: Path) -> None:
    """Write the report of a build whose other stages are done.

    Args:
        build_folder: as `deploy.artifacts.build_folder` describes it.
        out_file: the HTML file to write.

    Raises:
        InputError: if a file of the build is missing or is not what it should be.
    """
    results = {stage: layout.read(build_folder, stage) for stage in ("build", *layout.STAGES[:-1])}
    swept = any(stage["name"] == layout.SWEEP for stage in results["build"]["stages"])
    sweep = layout.read(build_folder, layout.SWEEP) if swept else None
    with replacing(out_file, is_file=True) as temporary:
        temporary.write_text(_render(results, sweep, build_folder), encoding="utf-8")


def _render(results: dict[str, dict[str, Any]], sweep: dict[str, Any] | None, folder: Path) -> str:
    import yaml

    build, bench, compare = results["build"], results["bench"], results["compare"]
    pictures, reencoded = _pictures(folder, compare["pictures"])
    bounds = {gate["gate"]: gate["bound"] for gate in build["gates"]}
    judged = {gate["gate"]: gate["verdict"] for gate in build["gates"]}
    if bench.get("gate"):
        judged.setdefault("speedup", bench["verdict"])
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            **results,
            sweep=sweep,
            charts=frontier_charts(sweep) if sweep else [],
            figures=_figures(build["figures"], bench, judged.get("speedup")),
            pictures=pictures,
            reencoded=reencoded,
            smooth_from=_SMOOTH_FROM,
            quality=_quality(compare.get("quality") or {}),
            sites=_sites(results["plan"]["sites"]),
            noise=_noise(compare["noise_error"], bounds.get("noise_error")),
            parity=_parity(results["validate"]),
            judged=judged,
            speedup=None if "skipped" in bench else _speedup(bench["speedup"], bounds.get("speedup")),
            recipe=yaml.safe_dump(build.get("recipe") or {}, sort_keys=False, allow_unicode=True),
        )
    )


def environment() -> Any:
    """The templates, with the filters that print numbers; shared by all pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("digits", "scaled", "in_bytes", "exact", "percent", "signed", "milliseconds", "duration", "measured"):
        made.filters[name] = getattr(numbers, name)
    made.filters["bound"] = gate_bound
    made.filters["value"] = gate_value
    return made


def gate_value(gate: Mapping[str, Any]) -> str:
    """What a gate was held against, with its unit."""
    value = gate["value"]
    if value is None:
        return "identical" if gate["gate"] == "psnr_db" and gate["verdict"] == "pass" else "not measured"
    if isinstance(value, bool):
        return "holds" if value else "does not hold"
    if gate["unit"] == "x":
        return f"{value:.3g}\u00d7" if value < 1 else f"{value:.2f}\u00d7"
    if gate["unit"] in ("points", "dB"):
        return f"{numbers.signless(value, 2)}{numbers.NBSP}{gate['unit']}"
    return numbers.digits(value)


def gate_bound(gate: Mapping[str, Any]) -> str:
    """What a gate asks for: `≥ 1.05×`."""
    sign = {"lower": "\u2264", "higher": "\u2265"}.get(gate["better"], "")
    unit = {"x": "\u00d7", "": ""}.get(gate["unit"], f"{numbers.NBSP}{gate['unit']}")
    return f"{sign}{numbers.NBSP}{gate['bound']:g}{unit}"


def _figures(figures: Mapping[str, Any], bench: Mapping[str, Any], verdict: str | None) -> list[Figure]:
    made = []
    for key, name, unit, note in (
        ("parameters", "Parameters", "", "in the denoiser"),
        ("macs", "MACs", "", "multiply-accumulates of one denoiser call at batch 1"),
        ("bytes", "Bytes", "B", "denoiser weights stored as float32 safetensors"),
    ):
        dense, slim = figures[key]["dense"], figures[key]["slim"]
        made.append(
            Figure(
                name,
                note,
                dense=numbers.scaled(dense, unit),
                slim=numbers.scaled(slim, unit),
                exact=f"{numbers.exact(dense)} dense, {numbers.exact(slim)} slim",
                share=slim / dense if dense else 1.0,
                change=numbers.change(slim / dense - 1) if dense else "",
            )
        )
    return [*made, _latency(figures.get("latency_ms"), bench, verdict)]


def _latency(figure: Mapping[str, float] | None, bench: Mapping[str, Any], verdict: str | None) -> Figure:
    name = "Latency"
    if figure is None or "skipped" in bench:
        return Figure(name, "", missing=str(bench.get("skipped") or "it was not measured"))
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    doubt = ""
    if low <= 1 <= high:
        doubt = "Inconclusive: the interval holds 0 %, so neither model is shown to be faster."
    elif verdict == "inconclusive":
        doubt = "Inconclusive against the gate: the interval holds its bound."
    return Figure(
        name,
        f"median of one denoiser call, {bench.get('runtime') or 'ONNX Runtime'}; change from paired runs",
        dense=numbers.milliseconds(figure["dense"]),
        slim=numbers.milliseconds(figure["slim"]),
        exact=f"{figure['dense']} ms dense, {figure['slim']} ms slim",
        share=figure["slim"] / figure["dense"],
        change=numbers.change(1 / median - 1),
        interval=f"95 % interval {numbers.change(1 / high - 1)} to {numbers.change(1 / low - 1)}",
        doubt=doubt,
    )


def _quality(quality: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    rows = []
    for name, metric in quality.items():
        share = metric.get("unit") == "share"
        dense, slim = metric["dense"], metric["slim"]
        if dense is None or slim is None:
            change = numbers.NONE
        elif share:
            change = f"{numbers.signed(100 * (slim - dense), 2)} points"
        else:
            change = numbers.signed(slim - dense, 3)
        show = numbers.percent if share else numbers.measured
        texts = {k: numbers.NONE if v is None else show(v) for k, v in (("dense", dense), ("slim", slim))}
        direction = {"higher": "higher is better", "lower": "lower is better"}.get(str(metric.get("better")), "")
        count = str(metric.get("count", "")) or numbers.NONE
        rows.append({"name": _spoken(name), "direction": direction, "change": change, "count": count, **texts})
    return rows


def _pictures(folder: Path, pictures: Sequence[Mapping[str, Any]]) -> tuple[list[Picture], bool]:
    """Pictures with their images as data URIs, and whether any of them had to be encoded again."""
    labels = {"dense": "dense", "slim": "slim", "slim_onnx": "slim, ONNX Runtime"}
    shown = [k for k in labels if any(p.get(k) for p in pictures)]
    made, reencoded = [], False
    for picture in pictures:
        images, size = [], (1, 1)
        for key in shown:
            uri = ""
            if picture.get(key):
                uri, size, again = _data_uri(folder / picture[key])
                reencoded |= again
            images.append((labels[key], uri))
        made.append(Picture(str(picture["caption"]), str(picture["seed"]), images, *size))
    return made, reencoded


def _data_uri(file: Path) -> tuple[str, tuple[int, int], bool]:
    from PIL import Image

    try:
        data, kind, again = file.read_bytes(), "png", False
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            if len(data) > INLINE_BYTES:
                buffer = io.BytesIO()
                image.save(buffer, "WEBP", quality=92, method=4)
                data, kind, again = buffer.getvalue(), "webp", True
    except OSError as error:
        raise InputError(f"{file} cannot be shown in the report ({error}): build again with --force compare") from error
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size, again


def _sites(planned: Mapping[str, Mapping[str, Any]]) -> Sites:
    # What was in no group that was asked for has nothing to tell but that it is dense.
    sites = {name: s for name, s in planned.items() if s["rank"] < s["dense_rank"] or s.get("local_error") is not None}
    predicted = any(s.get("predicted_error") is not None for s in sites.values())
    key = "predicted_error" if predicted else "local_error"
    errors = log_scale(s.get(key) for s in sites.values())
    sensitivities = log_scale(s.get("sensitivity") for s in sites.values())
    blocks: dict[str, list[Row]] = defaultdict(list)
    for name, site in sites.items():
        block, dot, _ = site["path"].rpartition(".")
        heads = f" per head, {site['heads']} heads" if site["heads"] > 1 else ""
        error, sensitivity = site.get(key), site.get("sensitivity")
        blocks[block or "denoiser"].append(
            Row(
                prefix=block + dot,
                leaf=name.removeprefix(block + dot),
                group=site["group"],
                rank=f"{site['rank']}/{site['dense_rank']}",
                title=f"{name}: rank {site['rank']} of {site['dense_rank']}{heads}",
                share=round(100 * site["rank"] / site["dense_rank"], 2),
                error=numbers.NONE if error is None else numbers.digits(error, 2),
                error_at=place(errors, error),
                sensitivity=numbers.NONE if sensitivity is None else numbers.digits(sensitivity, 2),
                sensitivity_at=place(sensitivities, sensitivity),
            )
        )
    totals = []
    from slimdiff.settings import TRANSFORMER_GROUPS

    for group in dict.fromkeys([*TRANSFORMER_GROUPS, *(s["group"] for s in sites.values())]):
        members = [s for s in sites.values() if s["group"] == group]
        if members:
            kept = sum(s["rank"] for s in members) / sum(s["dense_rank"] for s in members)
            known = [s[key] for s in members if predicted and s.get(key) is not None]
            error = numbers.digits(sum(known), 2) if known else numbers.NONE
            totals.append(GroupTotal(group, len(members), numbers.percent(kept), error))
    error_name = "predicted error" if predicted else "local error"
    return Sites(dict(blocks), totals, error_name, errors, sensitivities, len(sites), len(planned) - len(sites))


def _noise(noise: Mapping[str, Any], bound: float | None) -> NoiseChart | None:
    values = [(t, v) for t, v in noise["by_timestep"] if v is not None]
    overall = noise["relative_mse"]
    y = log_scale([*(v for _, v in values), overall, bound])
    drawn = [(t, v) for t, v in values if v > 0]
    if y is None or not drawn:
        return None

    def height(value: float | None) -> float | None:
        at = place(y, value)
        return None if at is None else round(100 - at, 2)

    first, last = max(t for t, _ in values), min(t for t, _ in values)
    x = Scale(first, min(0, last) if first > 0 else last - 1)  # in the order of sampling: from noise to image
    points = [(x.at(t), round(100 - y.at(v), 2), f"t = {t}: {numbers.digits(v)}") for t, v in drawn]
    ends = [extreme(drawn, key=lambda p: p[1]) for extreme in (min, max)]
    least, most = (f"at t{numbers.NBSP}={numbers.NBSP}{t} ({numbers.digits(v)})" for t, v in ends)
    return NoiseChart(
        path=line((px, py) for px, py, _ in points),
        points=points,
        rows=[(str(t), numbers.digits(v)) for t, v in values],
        x=_timestep_ticks(x),
        y=[Tick(100 - tick.at, tick.label) for tick in y.ticks()],
        overall=height(overall),
        bound=height(bound),
        summary=f"smallest {least}, largest {most}",
    )


def _timestep_ticks(x: Scale) -> list[Tick]:
    rising = Scale(x.high, x.low)
    return [Tick(round(100 - tick.at, 2), tick.label) for tick in reversed(rising.ticks())]


def _parity(validate: Mapping[str, Any]) -> list[Parity]:
    if "skipped" in validate:
        return []
    parts = validate.get("parts") or [{"name": "Slim in its runtime against slim in torch", **validate}]
    made = []
    for part in parts:
        checks = list(part["checks"])
        by_metric: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for check in checks:
            by_metric[check["metric"]].append(check)
        worst = [_worst(c) for c in by_metric.values()] if len(checks) > _SHORT_TABLE else []
        made.append(
            Parity(
                name=str(part["name"]),
                precision=str(part.get("precision") or ""),
                passed=bool(part["passed"]),
                first_diverging=part.get("first_diverging"),
                checks=checks,
                worst=worst,
            )
        )
    return made


def _worst(checks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one metric's checks, one that failed before one that holds, then the one nearest to its bound."""

    def distance(check: Mapping[str, Any]) -> tuple[bool, float]:
        value, bound = check["value"], check["bound"]
        if not isinstance(value, int | float) or not isinstance(bound, int | float):
            return bool(check["passed"]), -1.0
        return bool(check["passed"]), abs(value - bound) * (1 if check["passed"] else -1)

    return min(checks, key=distance)


def _speedup(speedup: Mapping[str, float], bound: float | None) -> Speedup:
    low, median, high = (speedup[k] for k in ("low", "median", "high"))
    axis = linear_scale([low, high, 1.0, *([] if bound is None else [bound])])
    ticks = axis.ticks(5)
    return Speedup(
        low=axis.at(low),
        median=axis.at(median),
        high=axis.at(high),
        same=axis.at(1.0),
        bound=None if bound is None else axis.at(bound),
        ticks=[Tick(t.at, f"{t.label}\u00d7") for t in ticks],
    )


def _spoken(name: str) -> str:
    text = name.replace("_", " ")
    return (text[:1].upper() + text[1:]).replace("Frechet", "Fréchet")

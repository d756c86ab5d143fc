"""`slimdiff bench`: is the candidate slower? Paired latency in fresh processes, and its history."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from deploy.cli import flags
from deploy.cli.console import calm_libraries, log, result
from deploy.cli.outputs import check_new_file, check_runnable
from exporters.registry import names
from exporters.settings import BenchSettings
from slimdiff.errors import InputError
from slimdiff.loading.naming import find_component
from slimdiff.settings import Sampling

if TYPE_CHECKING:
    from deploy.history.results import Series
    from deploy.history.summary import Case
    from exporters.latency.decision import Gate
    from exporters.latency.pair import Job
    from slimdiff.schedule import Schedule

DESCRIPTION = """Time one denoiser call of each in turn (or one whole image), in pairs of fresh processes, so that what
slows the machine slows both, and give the speedup with its interval. Pairs are added until the gate is decided: pass
if the whole interval keeps it, fail if the whole interval breaks it. Models are exported first where the runtime takes
graphs. With --history alone, show the results so far and where they changed."""
EXAMPLE = """examples:
  slimdiff bench dense-onnx slim-onnx --gate 'speedup>=1.05'
  slimdiff bench released candidate --tolerance 5% --history latency.jsonl --label "$COMMIT" --junit latency.xml
  slimdiff bench demo demo-slim --runtime torch --gate 'latency<=1.03' --json
  slimdiff bench demo demo --of image --schedule schedule.json     # text encoder, all steps, VAE
  slimdiff bench demo-onnx demo-onnx --base-runtime onnxruntime --runtime openvino
  slimdiff bench --history latency.jsonl --plot latency.svg"""

_FILES = {"history": "history", "junit": "JUnit file", "markdown": "text file", "plot": "SVG drawing"}
_OF_IMAGE = ("pipeline", "schedule", "base_schedule")
EXIT_CODE = {"pass": 0, "fail": 1, "inconclusive": 4}


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "base", "BASE", "a model, ONNX, or an engine", nargs="?")
    flags.text(parser, "candidate", "CANDIDATE", "a model, ONNX, or an engine", nargs="?")
    parser.add_argument("--runtime", choices=names(), help="default: onnxruntime, or what an engine was built with")
    parser.add_argument("--base-runtime", choices=names(), help="of BASE, if it is another")
    bound = parser.add_mutually_exclusive_group()
    flags.text(bound, "--gate", "BOUND", "such as 'latency<=1.03' (candidate over base) or 'speedup>=1.1'")
    flags.text(bound, "--tolerance", "SHARE", "slowdown that is allowed: 5% is --gate 'latency<=1.05'")
    flags.add_variant(parser)
    flags.add(parser, BenchSettings, "max_seconds", "processes", "rounds", "warmup", "threads")
    flags.add_usage(parser, "guidance")
    samples = "samples in a call, where the artifact does not fix it (default: 2, and 1 for guidance up to 1)"
    flags.add(parser, BenchSettings, "batch", help=f"{samples}; of an image: how many at once (default: 1)")
    parser.add_argument("--of", choices=("call", "image"), default="call", help="what is timed (default: call)")
    image = parser.add_argument_group("of an image")
    flags.add_usage(image, "steps")
    flags.add(image, Sampling, "height", "width", "scheduler")
    flags.text(image, "--pipeline", "MODEL", "whose other components go with a denoiser alone")
    flags.add_schedule(image)
    flags.text(image, "--base-schedule", "FILE", "of BASE, where --schedule is CANDIDATE's (default: its own); or none")
    results = parser.add_argument_group("history and CI")
    flags.text(results, "--history", "FILE", "add the result to this file; alone: show it", type=Path)
    flags.sentence(results, "--label", "of the result in the history, such as a commit", default="")
    flags.text(results, "--junit", "FILE", "write JUnit XML", type=Path)
    flags.text(results, "--markdown", "FILE", "write a Markdown summary", type=Path)
    flags.text(results, "--plot", "FILE.svg", "draw the history", type=Path)
    results.add_argument("--trend", choices=("ratio", "milliseconds"), default="ratio", help="what is followed")
    flags.whole(results, "--last", "only this many results of each series")
    results.add_argument("--across-machines", action="store_true", help="compare results of different machines")


def run(args: argparse.Namespace) -> int:
    gate, alone = gate_of(args), args.base is None
    for flag, what in _FILES.items():
        if (file := getattr(args, flag)) is not None and not (alone and flag == "history"):
            check_new_file(file, what, f"--{flag}")
    if alone and args.history is not None:
        return _show(args, gate)
    if args.base is None or args.candidate is None:
        raise InputError("name BASE and CANDIDATE, or --history FILE alone to see the results so far")
    if args.plot is not None and args.history is None:
        raise InputError("--plot draws a history: say with --history which")
    for name in (*_OF_IMAGE, *(f"Sampling.{name}" for name in ("steps", "height", "width", "scheduler"))):
        if args.of == "call" and getattr(args, name) is not None:
            flag = f"--{name.rpartition('.')[2].replace('_', '-')}"
            raise InputError(f"{flag} is of a whole image, and a call is timed: give --of image with it")
    check_runnable(args.base, args.candidate, args.pipeline)
    return _measure(args, gate)


def gate_of(args: argparse.Namespace) -> Gate | None:
    """What `--gate` or `--tolerance` asks for."""
    from exporters.latency.decision import Gate

    if args.tolerance is None:
        return Gate.parse(args.gate) if args.gate else None
    try:
        share = float(args.tolerance.removesuffix("%")) / (100 if args.tolerance.endswith("%") else 1)
    except ValueError:
        share = -1
    if not 0 <= share < 1:
        raise InputError(f"--tolerance is like 5% or 0.05, not {args.tolerance!r}")
    return Gate("latency", round(1 + share, 6))


def _measure(args: argparse.Namespace, gate: Gate | None) -> int:
    from deploy.artifacts.kinds import kind_of
    from deploy.history import results, summary
    from exporters.latency.measure import bench

    chosen = flags.read(args, BenchSettings)
    variants = flags.read_variants(args, args.base, args.candidate, args.pipeline)
    usage = flags.read_usage(args, args.candidate, args.base)
    if "batch" not in chosen.model_fields_set and (args.of == "image" or usage.guidance <= 1):
        chosen = chosen.model_copy(update={"batch": 1})
    usage = usage.model_copy(update={"batch": chosen.batch})
    schedules = _schedules(args) if args.of == "image" else {}
    with TemporaryDirectory(prefix="slimdiff-bench-") as scratch:
        asked = {"base": (args.base, args.base_runtime or args.runtime), "candidate": (args.candidate, args.runtime)}
        # Exports come last: what else is wrong shows before them.
        order = sorted(asked, key=lambda place: kind_of(asked[place][0]) == "model")
        jobs = {
            place: _of_image(args, *asked[place], usage, schedules[place], Path(scratch) / place, variants)
            if args.of == "image"
            else job_of(*asked[place], chosen.batch, Path(scratch) / place, variants[asked[place][0]])
            for place in order
        }
        base, candidate = jobs["base"], jobs["candidate"]
        log.info("bench: %s against %s, for at most %g s", candidate.name, base.name, chosen.max_seconds)
        value = {"of": args.of, **bench(base, candidate, chosen, gate=gate)}
    value["hints"] += _carried(schedules, value)
    code = result(args, value, summary.text(value), EXIT_CODE[value["verdict"]])  # first: a full disk does not lose it
    if args.history is not None:
        results.append(args.history, value, args.label)
    _write(args, [summary.case_of(value)], summary.markdown(value))
    return code


def _schedules(args: argparse.Namespace) -> dict[str, Schedule | None]:
    """What each side's images are made by; one of another model shows before any export."""
    from deploy.artifacts.schedules import check_schedule, find_schedule

    asked = {"base": (args.base, args.base_schedule), "candidate": (args.candidate, args.schedule)}
    schedules = {place: find_schedule(*each) for place, each in asked.items()}
    for place, schedule in schedules.items():
        check_schedule(asked[place][0], schedule)
    return schedules


def _carried(schedules: dict[str, Schedule | None], value: dict[str, Any]) -> list[str]:
    """What people should know of schedules for another number of calls than the images took."""
    said = []
    for place, own in schedules.items():
        side = value["baseline" if place == "base" else place]
        if own is not None and (followed := side["schedule"])["steps"] != own.steps:
            said.append(f"the schedule of {side['name']} {own.how_carried(followed['steps'])}")
    return said


def _of_image(
    args: argparse.Namespace,
    name: str,
    runtime: str | None,
    usage: Sampling,
    schedule: Schedule | None,
    scratch: Path,
    variants: dict[str | None, str | None],
) -> Job:
    """The artifact as its whole image is to be timed."""
    calm_libraries()
    from deploy.opening.picture import picture_job

    chosen: Any = {"variant": variants[name], "rest": args.pipeline, "rest_variant": variants[args.pipeline]}
    return picture_job(name, runtime, usage, schedule, scratch, **chosen)


def job_of(name: str, runtime: str | None, batch: int, scratch: Path, variant: str | None = None) -> Job:
    """An artifact as it is to be run: in the runtime that was asked for, exported if that takes graphs.

    Args:
        variant: of a model's weights.

    Raises:
        InputError: if it is nothing that can be run, or that runtime does not take it.
        MissingPackageError: if the runtime is not here.
    """
    from deploy.artifacts.kinds import engine_of, graph_of, kind_of
    from deploy.opening.openers import runtime_for
    from exporters.latency.pair import Job

    kind = kind_of(name)
    alone = variant or find_component(name)  # which the process that times it does not open itself
    if kind == "model" and (runtime is None or runtime in names("graph") or (runtime == "torch" and alone)):
        return written(name, runtime or "onnxruntime", batch, scratch, variant)
    runtime = runtime_for(name, kind, runtime)
    if kind == "model":
        return Job(name, name, runtime)
    return Job(name, str(graph_of(name) if kind == "onnx" else engine_of(name, kind)), runtime)


def written(name: str, runtime: str, batch: int, folder: Path, variant: str | None = None) -> Job:
    """A model's denoiser as that runtime takes it: its graph, or its weights."""
    from deploy.opening.openers import open_denoiser
    from exporters.graphs.alone import call_of_unet
    from exporters.graphs.pipeline import example_call
    from exporters.latency.pair import write_job
    from exporters.runtimes.opening import version_of

    version_of(runtime)  # whether it is here shows before the export
    calm_libraries()
    log.info("bench: exporting %s", name)
    opened = open_denoiser(name, variant=variant)
    whole = opened.pipeline is not None
    call = example_call(opened.pipeline, batch=batch) if whole else call_of_unet(opened.denoiser, batch=batch)
    return write_job(name, opened.denoiser, call, runtime, folder)


def _show(args: argparse.Namespace, gate: Gate | None) -> int:
    """The history's trend; with a gate, whether a series has crept beyond it since it was fastest."""
    from deploy.history import summary
    from deploy.report import trend

    series, skipped = _trends(args)
    verdicts = [gate.verdict(1 / s.creep, 1 / s.creep) if gate else "pass" for s in series]
    verdict = "fail" if "fail" in verdicts else "pass"
    value = {
        "verdict": verdict,
        "gate": str(gate) if gate else None,
        "skipped_lines": skipped,
        "series": [_as_json(s, v) for s, v in zip(series, verdicts, strict=True)],
    }
    text = trend.text(series, skipped) + (f"\n\ngate {gate}: {verdict}" if gate else "")
    code = result(args, value, text, EXIT_CODE[verdict])
    cases = [
        summary.Case(
            f"trend of {trend.heading(s)}", v, f"{s.creep - 1:.1%} above its fastest level", trend.text([s], 0)
        )
        for s, v in zip(series, verdicts, strict=True)
    ]
    _write(args, cases, trend.markdown(series, skipped))
    return code


def _write(args: argparse.Namespace, cases: list[Case], markdown: str) -> None:
    """Write the files for CI and the plot, as far as they are asked for."""
    from deploy.history import summary
    from deploy.report import trend

    if args.junit:
        summary.write_junit(cases, args.junit)
    if args.markdown:
        summary.write_text(markdown, args.markdown)
    if args.plot:
        trend.write_plot(_trends(args)[0], args.plot)


def _trends(args: argparse.Namespace) -> tuple[list[Series], int]:
    """The history's series, and how many of its lines were damaged."""
    from deploy.history import results

    entries, skipped = results.read(args.history)
    return results.all_series(entries, args.trend, across_machines=args.across_machines, last=args.last), skipped


def _as_json(series: Series, verdict: str) -> dict[str, Any]:
    results = [
        {"time": e.time.isoformat(), "label": e.label, "verdict": e.verdict, "value": e.value(series.trend)}
        for e in series.entries
    ]
    return {
        **{name: getattr(series, name) for name in ("baseline", "candidate", "runtime", "machine", "trend")},
        "verdict": verdict,
        "above_fastest": series.creep - 1,
        "results": results,
        "levels": [vars(level) for level in series.levels],
        "changes": [level.start for level in series.levels[1:]],
    }

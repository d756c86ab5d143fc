"""`slimdiff engine`: an engine from an ONNX folder, several, one per shape, or one of every graph of a pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.artifacts.numbers import size
from deploy.cli import flags
from deploy.cli.console import log, result
from deploy.cli.outputs import artifact_folder, check_folder
from exporters.settings import EngineSettings
from slimdiff.errors import InputError
from slimdiff.schedule import FILE
from slimdiff.settings import MOST_AT_ONCE
from slimdiff.storage import manifest

if TYPE_CHECKING:
    from exporters.engine.build import EngineRequest
    from slimdiff.schedule import Schedule

DESCRIPTION = """Build an engine of the UNet's graph, or with --whole of every graph of its pipeline, unless the one
in DIR is that very engine. TensorRT-RTX builds for named targets without a GPU. A slim graph's inner dimensions are
checked against its plan, before and after parsing. Of a model with a schedule, all that its steps run is built: the
shallow graph, too, and where steps go without guidance, for their smaller batch, too."""
EXAMPLE = """examples:
  slimdiff export slim --out slim-onnx --precision fp16
  slimdiff engine slim-onnx --out slim-engine --backend tensorrt-rtx --target sm89 --target sm120

from a graph with an open batch, one engine per shape, in slim-engines/batch-2 and slim-engines/batch-4:
  slimdiff export slim --out slim-open --precision fp16 --dynamic batch
  slimdiff engine slim-open --out slim-engines --target sm89 --batch 2 --batch 4

or one engine for a range of shapes (an optimisation profile), as trtexec writes them:
  slimdiff engine slim-open --out slim-engine --target sm89 \\
    --min-shapes sample:1x4x64x64 --opt-shapes sample:2x4x64x64 --max-shapes sample:8x4x64x64

or every graph of the pipeline as an engine, in a folder that makes images as it is:
  slimdiff engine slim-onnx --whole --out slim-pipeline --target sm89
  slimdiff generate slim-pipeline --prompt "..." --out image.png"""

ENDS = ("min", "opt", "max")


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "onnx", "ARTIFACT", "what `slimdiff export` wrote, or a folder with model.onnx")
    flags.text(parser, "--out", "DIR", "where the engine goes", required=True)
    whole = "text encoders and VAE too, an engine each in its graph's place; batches follow the UNet's"
    parser.add_argument("--whole", action="store_true", help=whole)  # --pipeline names a model in other commands
    flags.add(parser, EngineSettings, "backend")
    flags.add(parser, EngineSettings, "targets", flag="--target", action="append", metavar="SM")
    shapes = parser.add_argument_group("shapes", "for graphs that leave dimensions open; inputs not named follow")
    flags.several(shapes, "--batch", "N", "of an engine", type=flags.whole_number(MOST_AT_ONCE))
    flags.several(shapes, "--shapes", "SPEC", "of an engine, as in sample:2x4x64x64")
    for end in ENDS:
        flags.several(shapes, f"--{end}-shapes", "SPEC", "of an engine's optimisation profile")
    flags.add(parser, EngineSettings, "workspace_gib", "tf32")
    parser.add_argument("--ignore-memory", action="store_true", help="build though memory seems too small")


def run(args: argparse.Namespace) -> int:
    from deploy.artifacts.kinds import graph_of, plan_beside
    from deploy.artifacts.schedules import find_schedule
    from exporters.layout import ENGINE_PIPELINE
    from slimdiff.storage.atomic import clear_leftovers
    from slimdiff.storage.lock import locked

    out, source = Path(args.out), Path(args.onnx)
    settings = _settings(args)
    kind = ENGINE_PIPELINE if args.whole else "engine" if list(settings) == [""] else "engines"
    if args.whole and list(settings) != [""]:
        raise InputError("--whole makes one pipeline: ask for one shape, or for several profiles of it (--min-shapes)")
    if out.is_dir():
        clear_leftovers(out)  # a folder with nothing else in it looks like somebody else's
    check_folder(out, kind)
    graph = graph_of(args.onnx)
    schedule = find_schedule(args.onnx, None)
    plan = plan_beside(graph)
    log.info("engine: %s, %s", graph, "dense" if plan is None else "slim, checked against its plan")

    from deploy.artifacts.files import copy_licenses
    from exporters.engine.build import request_engine
    from exporters.engine.pipeline import finish_pipeline, request_pipeline
    from exporters.engine.scheduled import branches_of

    how: Any = {"plan": plan, "branches": branches_of(graph, schedule)}
    if args.whole:
        requests = request_pipeline(source, settings[""], **how)
    else:
        requests = {name: request_engine(graph, chosen, **how) for name, chosen in settings.items()}
    if kind == "engine":
        report = _make(requests[""], out, schedule)
        return result(args, report, _text(report))
    with locked(out, kind.replace("-", " "), stays=False):
        own = None if args.whole else schedule  # that of a pipeline lies beside its index
        engines = [{"name": name, **_make(requests[name], out / name, own, args.whole)} for name in requests]
        if args.whole:
            copy_licenses(source, out)
            finish_pipeline(source, out, {engine["name"]: engine for engine in engines})
        else:
            _describe_set(out, engines)
    return result(args, {"out": str(out), "engines": engines}, "\n".join(map(_text, engines)))


def _settings(args: argparse.Namespace) -> dict[str, EngineSettings]:
    """Per engine, by the name of its folder (empty if there is one engine), how it is built."""
    ends = {end: [_shapes(spec) for spec in getattr(args, f"{end}_shapes")] for end in ENDS}
    if len(set(map(len, ends.values()))) > 1:
        raise InputError("a profile has --min-shapes, --opt-shapes and --max-shapes: give as many of each")
    profiles = [dict(zip(ends, shapes, strict=True)) for shapes in zip(*ends.values(), strict=True)]
    ways: list[tuple[str, dict[str, Any]]] = [(f"batch-{n}", {"batch": n}) for n in args.batch]
    ways += [(spec.replace(":", "-").replace(",", "_"), {"shapes": _shapes(spec)}) for spec in args.shapes]
    if args.batch and args.shapes or profiles and ways:
        raise InputError("shapes are said in one way: --batch, --shapes, or --min-, --opt- and --max-shapes")
    if len({name for name, _ in ways}) < len(ways):
        raise InputError("the same shape is asked for twice")
    if len(ways) < 2:
        ways = [("", dict(ways[0][1]) if ways else {"profiles": profiles})]
    return {name: flags.read(args, EngineSettings, check_memory=not args.ignore_memory, **way) for name, way in ways}


def _shapes(spec: str) -> dict[str, str]:
    """`sample:2x4x64x64,text:2x77x768`, as trtexec takes it."""
    parts = [part.strip().rpartition(":") for part in spec.split(",")]
    if not all(name for name, _, _ in parts):
        raise InputError(f"shapes are written like sample:2x4x64x64, with commas between inputs, not {spec!r}")
    return {name: shape for name, _, shape in parts}


def _make(request: EngineRequest, out: Path, schedule: Schedule | None, part: bool = False) -> dict[str, Any]:
    """Build an engine unless it is there; as part of a pipeline, what held that together goes when the engine does.

    Args:
        schedule: that the engine's images are made by, which then lies beside it.
    """
    from exporters.engine.check import read_engine
    from exporters.engine.pipeline import mark_unfinished

    why = request.why_build(out)
    if why is None and schedule is None and (out / FILE).is_file():
        why = "the graph has no schedule any more"
    if why is None:
        if schedule is not None:
            manifest.put_file(out, FILE, schedule.save)
        log.info("engine: %s is unchanged, not built again", out)
        return {"out": str(out), "reused": True, "built_because": None, **read_engine(out)}
    log.info("engine: %s is built, because %s", out, why)
    with artifact_folder(out, "engine") as temporary:
        report = request.build(temporary)
        if schedule is not None:
            manifest.put_file(temporary, FILE, schedule.save)
        if part:
            mark_unfinished(out.parent)
    odd = [row for row in report["engine_sites"] or [] if row["ok"] is False]
    if odd:
        log.warning("engine: its layers do not show the plan's dims at %d places, first %s", len(odd), odd[0]["site"])
    return {"out": str(out), "reused": False, "built_because": why, **report}


def _describe_set(out: Path, engines: list[dict[str, Any]]) -> None:
    keys = {engine["name"]: engine["key"] for engine in engines}
    if (out / manifest.MANIFEST).is_file():  # engines from before, for other shapes, stay in the set
        keys = {**manifest.read_manifest(out)["made_from"].get("engines", {}), **keys}
    manifest.write_manifest(out, "engines", {"engines": keys}, {"backend": engines[0]["backend"]})


def _text(value: dict[str, Any]) -> str:
    fused, seconds = value["fused_attention"], value["seconds"]
    targets = ", ".join(value["targets"]) or "the GPU here"
    made = "unchanged, not built again" if value["reused"] else f"built in {seconds:.1f} s ({value['built_because']})"
    return (
        f"{value['out']}: {value['backend']} {value['version']} for {targets}, {size(value['bytes'])}, "
        f"{fused['calls']} fused attention calls, {made}"
    )

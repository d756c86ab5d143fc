"""`slimdiff engine`: an engine with fixed shapes from an ONNX folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

EXAMPLE = """examples:
  slimdiff export slim --out slim-onnx --precision fp16
  slimdiff engine slim-onnx --out slim-engine --backend tensorrt-rtx --target sm89 --target sm120"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "engine",
        help="a TensorRT or TensorRT-RTX engine with fixed shapes, from an ONNX folder",
        description="Build an engine of the UNet's graph. TensorRT-RTX builds for named targets without a GPU. A slim "
        "graph's inner dimensions are checked against its plan, before and after parsing.",
        epilog=EXAMPLE,
    )
    parser.add_argument("onnx", metavar="DIR", help="what `slimdiff export` wrote, or a folder with model.onnx")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the engine goes")
    parser.add_argument(
        "--backend", choices=("auto", "tensorrt", "tensorrt-rtx"), default="auto", help="default: what is installed"
    )
    parser.add_argument(
        "--target", action="append", default=[], metavar="SM", help="compute capability such as sm89; TensorRT-RTX only"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="for a graph that leaves its batch open")
    parser.add_argument("--workspace-gib", type=float, metavar="GIB", help="most memory that a layer may use")
    return parser


def run(args: argparse.Namespace) -> int:
    from deploy.arguments import settings
    from deploy.console import in_bytes, log, result
    from deploy.openers import graph_of, plan_beside
    from deploy.outputs import artifact_folder, check_folder
    from exporters.engine import EngineSettings, build_engine
    from slimdiff import artifacts

    out = Path(args.out)
    check_folder(out, artifacts.MANIFEST)
    chosen = settings(EngineSettings, args, "backend", "batch", "workspace_gib", targets=args.target)
    graph = graph_of(args.onnx)
    plan = plan_beside(graph)
    log.info("engine: %s, %s", graph, "dense" if plan is None else "slim, checked against its plan")
    with artifact_folder(out) as temporary:
        report = build_engine(graph, temporary, chosen, plan=plan, progress=None if args.quiet else "engine")
        if (graph.parent / "config.json").is_file():  # what a pipeline reads of its unet
            shutil.copy(graph.parent / "config.json", temporary)
        runs_on = {k: report.get(k) for k in ("backend", "version", "targets", "inputs", "outputs")}
        made_from = {"onnx": artifacts.sha256_of(graph), "settings": chosen.model_dump()}
        artifacts.write_manifest(temporary, "engine", made_from, runs_on)
    fused = report["fused_attention"]
    targets = ", ".join(report["targets"]) or "the GPU here"
    text = (
        f"{out}: {report['backend']} {report['version']} for {targets}, {in_bytes(report['bytes'])}, "
        f"built in {report['seconds']:.1f} s, {fused['calls']} fused attention calls"
    )
    result({"out": str(out), **report}, text, args.json)
    return 0

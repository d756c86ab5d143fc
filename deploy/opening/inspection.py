"""What is known of each kind of artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import costs, denoiser_of
from deploy.artifacts.kinds import ENGINE_REPORT, graph_of, plan_beside
from deploy.bundle.archive import unpack
from deploy.bundle.description import read_bundle
from exporters.dtypes import PRECISIONS
from exporters.graphs.alone import call_of_unet
from exporters.graphs.int8_layers import is_int8, share_of_macs
from exporters.graphs.naming import check_reduced_dims, weight_dims
from exporters.graphs.pipeline import example_call
from exporters.graphs.reading import graph_files, inputs_of, outputs_of, read_graph
from exporters.layout import ENGINE_PIPELINE, GRAPH, parts_of
from slimdiff import Plan, Statistics
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS, find_sites
from slimdiff.loading.naming import find_component, places_of
from slimdiff.loading.pipelines import load_denoiser, load_pipeline
from slimdiff.models import plan_of
from slimdiff.planning.costs import count_bytes, count_parameters
from slimdiff.schedule import FILE, Schedule
from slimdiff.storage import manifest as manifests


def model(name: str, variant: str | None = None) -> dict[str, Any]:
    """A diffusers pipeline, dense or slim; or a denoiser alone, whose `pipeline` is null."""
    pipeline = None if find_component(name) else load_pipeline(name, variant=variant)
    denoiser = load_denoiser(name, variant=variant) if pipeline is None else denoiser_of(pipeline)
    plan = plan_of(denoiser)
    if plan is not None:
        rows, left_dense = sites_of(plan), plan.left_dense
    else:
        sites, left_dense = find_sites(denoiser)
        rows = [site_row(s.name, s.group, s.heads, s.dense_rank, s.dense_rank) for s in sites]
    return {
        "pipeline": None if pipeline is None else type(pipeline).__name__,
        "denoiser": type(denoiser).__name__,
        "slim": plan is not None,
        **_costs(denoiser, pipeline),
        "dense_parameters": plan.parameters["dense"] if plan else None,
        "sites": rows,
        "left_dense": left_dense,
        "lora": plan.calibration.get("lora") if plan else None,
        **_scheduled(places_of(name)[-1]),
        "provenance": provenance(places_of(name)[-1]),
    }


def _costs(denoiser: Any, pipeline: Any) -> dict[str, Any]:
    """Of a model that prompts alone do not run: all but its multiply-adds, and why those are not counted."""
    try:
        call = call_of_unet(denoiser, batch=1) if pipeline is None else example_call(pipeline, batch=1)
        return dict(costs(denoiser, call))
    except InputError as error:
        sizes = {"parameters": count_parameters(denoiser), "bytes": count_bytes(denoiser)}
        return {**sizes, "macs": None, "macs_not_counted": str(error)}


def onnx(name: str) -> dict[str, Any]:
    """A UNet's graph: dims from the graph itself."""
    graph = graph_of(name)
    content, plan = read_graph(graph), plan_beside(graph)
    if "" not in content.opset_imports or not len(content.graph):
        raise InputError(f"{graph} holds no ONNX graph: export the model again")
    rows: list[dict[str, Any]] = [
        {"site": module, "dims": " x ".join(map(str, dims))} for module, dims in sorted(weight_dims(content).items())
    ]
    value: dict[str, Any] = {
        "graph": graph.name,
        "opset": content.opset_imports[""],
        "nodes": len(content.graph),
        **precision_of(content),
        "inputs": {name: list(spec.shape) for name, spec in inputs_of(content).items()},
        "outputs": {name: list(spec.shape) for name, spec in outputs_of(content).items()},
        **_sizes(graph_files(graph)),
        "parts": [{"part": part, **_sizes([folder / GRAPH])} for part, folder in parts_of(graph).items()] or None,
        "slim": plan is not None,
        **_scheduled(Path(name)),
    }
    if plan is not None:
        checked = check_reduced_dims(graph, plan)
        value["follows_plan"] = all(row["ok"] for row in checked)
        wrong = {row["site"] for row in checked if not row["ok"]}
        rows = [{**row, "ok": row["site"] not in wrong} for row in sites_of(plan)]
    return {**value, "sites": rows, "provenance": provenance(Path(name))}


def _scheduled(folder: Path) -> dict[str, str]:
    """The schedule that lies in an artifact's folder, for people; nothing if there is none."""
    return {"schedule": str(Schedule.load(folder))} if (folder / FILE).is_file() else {}


def _sizes(graphs: list[Path]) -> dict[str, int]:
    """Parameters and bytes of graphs, weights beside them."""
    weights = [w.const_value for g in graphs for w in read_graph(g).graph.initializers.values() if w.const_value]
    files = [file for graph in graphs for file in graph.parent.glob(f"{graph.name}*")]
    return {"parameters": sum(w.size for w in weights), "bytes": sum(file.stat().st_size for file in files)}


def precision_of(graph: Any) -> dict[str, Any]:
    """A graph's `precision`, and `int8_macs`: the part of its multiply-adds in int8, None where its size is open."""
    if is_int8(graph):
        return {"precision": "int8", "int8_macs": share_of_macs(graph)}
    return {"precision": next((p for s in inputs_of(graph).values() if (p := PRECISIONS.get(s.dtype))), None)}


def engine(name: str) -> dict[str, Any]:
    """An engine, by what was read when it was built: without its GPU it cannot be opened."""
    folder = Path(name)
    if (folder / manifests.MANIFEST).is_file():
        manifests.verify_manifest(folder)
    report = manifests.read_json(folder / ENGINE_REPORT)
    if not isinstance(report, dict):
        raise InputError(f"{folder / ENGINE_REPORT} is not a JSON object: build the engine again")
    if not {"skipped", "backend"} & report.keys():
        raise InputError(f"{folder / ENGINE_REPORT} does not say what the engine is: build it again")
    if "skipped" in report:
        return {"skipped": report["skipped"]}
    rows = [
        {"site": row["site"], "dims": ", ".join(f"{name} {dim}" for name, dim in row["found"].items()), "ok": row["ok"]}
        for row in report.get("sites") or []
    ]
    built = ("backend", "version", "targets", "precision", "bytes", "seconds")
    kept = (*built, "inputs", "outputs", "layers", "fused_attention")
    more: dict[str, Any] = {"int8_layers": len(report["int8"])} if report.get("int8") else {}
    if engines := report.get("engines"):
        more["engines"] = [
            {
                **_only(row, ("file", "sha256", "bytes", "layers")),
                "int8_layers": len(row["int8"]),
                "follows_plan": row["sites"] and all(site["ok"] for site in row["sites"]),
            }
            for row in engines
        ]
    return {**_only(report, kept), **more, **_scheduled(folder), "sites": rows, "provenance": provenance(folder)}


def engines(name: str) -> dict[str, Any]:
    """Several engines: of one graph, or a pipeline's."""
    folder = Path(name)
    manifests.verify_manifest(folder)
    kept = ("backend", "version", "targets", "bytes", "inputs")
    folders = [file.parent for file in sorted(folder.glob(f"*/{ENGINE_REPORT}"))]
    if not folders:
        raise InputError(f"{folder} holds no engine: build it again")
    rows = [{"name": each.name, **_only(engine(str(each)), kept)} for each in folders]
    return {"engines": rows, "bytes": sum(row.get("bytes", 0) for row in rows), "provenance": provenance(folder)}


def bundle(name: str) -> dict[str, Any]:
    """A bundle: what it is for, needs and holds; an archive is unpacked for that, and so checked."""
    with TemporaryDirectory(prefix="slimdiff-inspect-") as scratch:
        folder = Path(name) if Path(name).is_dir() else unpack(Path(name), Path(scratch) / "bundle")
        content = read_bundle(folder)
        files = content.manifest["files"]
        return {
            **content.description.model_dump(),
            **_scheduled(folder),
            "files": len(files),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "provenance": _only(content.manifest, ("kind", "made_from", "versions")),
        }


def statistics(name: str) -> dict[str, Any]:
    """Second moments of a calibration."""
    path = Path(name)
    file = path / Path(build_folder.STATISTICS).name if path.is_dir() else path
    sums = Statistics.load(file)
    rows = [{"site": k, "dims": f"{list(m.shape)}, {sums.tokens[k]} tokens"} for k, m in sums.moments.items()]
    made_from = {"model_hash": sums.model_hash, **sums.made_from}
    return {"bytes": file.stat().st_size, "moments": len(rows), "sites": rows, "provenance": made_from}


def schedule(name: str) -> dict[str, Any]:
    """Which steps are guided and whole."""
    own = Schedule.load(name)
    return own.model_dump(exclude={"schema_version"})


def plan(name: str) -> dict[str, Any]:
    """Ranks by site."""
    path = Path(name)
    ranks = Plan.load(path / Path(build_folder.PLAN).name if path.is_dir() else path)
    return {
        "allocation": ranks.allocation,
        "align": ranks.align,
        "parameters": ranks.recount().parameters["slim"],
        "dense_parameters": ranks.parameters["dense"],
        **({"int8_layers": ranks.int8()} if ranks.layers else {}),
        "sites": sites_of(ranks),
        "left_dense": ranks.left_dense,
        "provenance": _only(vars(ranks), ("model_class", "model_hash", "calibration")),
    }


def build(name: str) -> dict[str, Any]:
    """A whole build."""
    whole = build_folder.read_verdict(Path(name))
    stages = [f"{s['name']} {s['seconds']:.1f} s" for s in whole["stages"]]
    gates = [f"{g['gate']} {g['verdict']}" for g in whole["gates"]]
    provenance = {**whole["made_from"], "versions": whole["versions"]}
    kept = _only(whole, ("sentence", "verdict", "figures", "machine"))
    return {**kept, "gates": gates, "stages": stages, "provenance": provenance}


LOOK: dict[str, Callable[..., dict[str, Any]]] = {
    "model": model,
    "onnx": onnx,
    "engine": engine,
    "engines": engines,
    ENGINE_PIPELINE: engines,
    "bundle": bundle,
    "statistics": statistics,
    "plan": plan,
    "schedule": schedule,
    "build": build,
}
"""How each kind of `kind_of` is looked at: by its name, and a model by the variant of its weights, too."""


def sites_of(plan: Plan) -> list[dict[str, Any]]:
    """A plan's sites as rows."""
    return [site_row(name, s.group, s.heads, s.dense_rank, s.rank) for name, s in plan.sites.items()]


def site_row(site: str, group: str, heads: int, dense_rank: int, rank: int) -> dict[str, Any]:
    """One site: `dims` is for people, e.g. `4 heads x 24 of 32`."""
    dims = f"{heads} heads x {rank} of {dense_rank}" if GROUPS[group].per_head else f"{rank} of {dense_rank}"
    return {"site": site, "group": group, "heads": heads, "dense_rank": dense_rank, "rank": rank, "dims": dims}


def provenance(folder: Path) -> dict[str, Any] | None:
    """From the manifest: what it was made from, runs on, and the versions that made it."""
    if not folder.is_dir() or not (folder / manifests.MANIFEST).is_file():
        return None
    return _only(manifests.read_manifest(folder), ("kind", "made_from", "runs_on", "versions"))


def _only(value: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value[key] for key in keys if key in value}

"""The chain: from a recipe to a report and a verdict. `deploy.artifacts.build_folder` says what the folder holds."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deploy
import exporters
import slimdiff
from deploy.artifacts import build_folder
from deploy.artifacts.figures import machine
from deploy.build import cells as cells_of_matrix
from deploy.build import steps
from deploy.build.gates import EXIT_CODE, judge, overall
from deploy.build.sensitivity import deciding
from deploy.build.stages import Done, Stage, keys, run_stages
from deploy.build.workshop import Workshop, model_hash, public_name, source_hash
from deploy.cli.console import amount, log
from deploy.recipe.recipe import Recipe
from slimdiff.errors import MissingPackageError, require
from slimdiff.storage import manifest
from slimdiff.storage.lock import locked

_CORE = ("torch", "diffusers", "transformers")
_EXPORT = (*_CORE, "onnx", "onnxscript", "onnxruntime")


def build(recipe: Recipe, name: str, folder: Path, force: Sequence[str] = (), ray: str | None = None) -> dict[str, Any]:
    """Run the chain; what is done already and has not changed is skipped.

    Args:
        recipe: all settings.
        name: what the build is called in the report.
        folder: the build folder.
        force: stages to do again, with all that depend on them.
        ray: where the cells of a matrix are built: the address of a Ray cluster that sees the same files, or `local`;
            None: here, one after the other.

    Returns:
        the content of `build.json`; `exit_code` is 0, 1 or 4, as the gates decide.

    Raises:
        SlimdiffError: if a stage cannot be done; what was finished before it is kept.
    """
    _preflight(recipe)
    if ray is not None:
        require("ray", "ray")
    with locked(folder):
        shop = Workshop(recipe, folder, force)
        stages = [*make_stages(shop), *sweep_stages(shop)]
        again = {s.name for s in stages if build_folder.SWEEP in force and s.name.startswith("point-")} | set(force)
        done: list[Done] = []

        def report(into: Path) -> None:
            """The report reads build.json, so that is written as soon as everything before is there."""
            from deploy.report.page import write_report

            manifest.write_json(folder / build_folder.BUILD, summary(shop, name, done))
            write_report(folder, into / build_folder.REPORT)

        cells = cells_of_matrix.Cells(shop, keys(stages)["slim"], again)
        page = source_hash(Path(deploy.__file__).parent / "report", "*.py", "templates/*")
        inputs = {"cells": cells.key, "report": page, "name": name}
        needs = tuple(stage.name for stage in stages)
        chain = [*stages, Stage("report", report, needs, recipe.gates.model_dump(), inputs, "report")]
        for stage in run_stages(folder, chain, again):
            done.append(stage)
            if stage.name == stages[-1].name:  # the report is made of the cells, too
                done += cells.build(ray)
        whole = summary(shop, name, done)
        manifest.write_json(folder / build_folder.BUILD, whole)
        with manifest.replacing(folder / build_folder.REPORT, is_file=True) as temporary:
            shutil.copyfile(folder / "report" / build_folder.REPORT, temporary)
        return whole


def make_stages(shop: Workshop) -> list[Stage]:
    """All stages but the report, with everything that decides their results."""
    return [*model_stages(shop), *artifact_stages(shop)]


def _core() -> dict[str, str]:
    return {"slimdiff": source_hash(Path(slimdiff.__file__).parent), **_versions(_CORE)}


def _export() -> dict[str, str]:
    return {
        **_core(),
        "exporters": source_hash(Path(exporters.__file__).parent),
        "steps": manifest.sha256_of(Path(steps.__file__)),
        **_versions(_EXPORT),
    }


def _here() -> dict[str, str]:
    return {"machine": manifest.fingerprint(machine())}


def model_stages(shop: Workshop) -> list[Stage]:
    """From the dense model to the slim one."""
    recipe, core = shop.recipe, _core()
    model = {"model": model_hash(recipe.model)}
    prompts = {"prompts": manifest.fingerprint(shop.prompts)}
    captions = {"captions": manifest.fingerprint(shop.captions)}
    held = {"held": manifest.fingerprint(shop.prompts_and_more)}
    trajectory = {"trajectory": recipe.compare.model_dump()["sampling"]}
    stage = partial(_stage, shop)
    return [
        stage(
            "calibrate", steps.calibrate_step, (), recipe.calibration.model_dump(), core | model | prompts, "statistics"
        ),
        stage(
            "sensitivity",
            steps.sensitivity_step,
            ("calibrate",),
            deciding(recipe.plan),
            core | held,
            "sensitivity",
        ),
        stage(
            "plan",
            steps.plan_step,
            ("calibrate", "sensitivity"),
            {**recipe.budget.model_dump(), **recipe.plan.model_dump()},
            core | held | (_export() | _here() | captions if recipe.budget.speedup is not None else {}),
            "plan",
        ),
        stage("slim", steps.slim_step, ("plan",), trajectory, core, "slim-model"),
    ]


def artifact_stages(shop: Workshop) -> list[Stage]:
    """What becomes of the slim model: graphs and engine, and how they are judged."""
    recipe, export = shop.recipe, _export()
    captions = {"captions": manifest.fingerprint(shop.captions)}
    compare = recipe.compare.model_dump()
    engine = {
        "skipped": str(steps.no_engine(shop)),
        "gpu": steps.engine_gpu(shop),
        **_versions(("tensorrt", "tensorrt-rtx-cu13", "polygraphy")),
    }
    trajectory = {"trajectory": compare["sampling"]}
    validate = {**recipe.validation.model_dump(), **trajectory}
    stage = partial(_stage, shop)
    return [
        stage(
            "export",
            steps.export_step,
            ("slim",),
            {**recipe.export.model_dump(), **trajectory},
            export | captions,
            "onnx",
            runs_on=steps.export_runs_on,
        ),
        stage(
            "engine",
            steps.engine_step,
            ("export",),
            recipe.engine.model_dump(),
            export | engine,
            "engine",
            runs_on=steps.engine_runs_on,
        ),
        stage("validate", steps.validate_step, ("slim", "export", "engine"), validate, export, "parity"),
        stage("compare", steps.compare_step, ("slim", "export"), compare, export | captions, "fidelity"),
        stage(
            "bench",
            steps.bench_step,
            ("export",),
            recipe.bench.model_dump() | _gate(recipe),
            export | _here(),
            "latency",
        ),
    ]


def _stage(
    shop: Workshop,
    name: str,
    step: Callable[[Workshop, Path], None],
    needs: tuple[str, ...],
    settings: dict[str, Any],
    inputs: dict[str, str],
    kind: str,
    **more: Any,
) -> Stage:
    return Stage(name, partial(step, shop), needs, settings, inputs, kind, **more)


def sweep_stages(shop: Workshop) -> list[Stage]:
    """The frontier: a stage for each point and one that puts them together, if the recipe asks for it."""
    from deploy.build import sweep
    from exporters.settings import TableSettings

    recipe, asked = shop.recipe, shop.recipe.sweep
    if asked is None:
        return []
    work = sweep.Sweep(
        recipe.model,
        shop.prompts_from,
        asked.by,
        asked.budgets(),
        recipe.calibration,
        recipe.plan,
        TableSettings(runtime=asked.runtime),
        recipe.bench,
        asked.images,
        shop.folder,
        lambda _: shop.dense,
    )
    points = sweep.point_stages(work)

    def together(folder: Path) -> None:
        steps.write_result(folder, build_folder.SWEEP, sweep.frontier(work, points))

    return [*points, Stage(build_folder.SWEEP, together, tuple(p.name for p in points), {}, {}, "sweep")]


def _gate(recipe: Recipe) -> dict[str, Any]:
    return {"min_speedup": recipe.gates.min_speedup}


def _preflight(recipe: Recipe) -> None:
    """Miss a package now rather than after an hour of calibration.

    Raises:
        MissingPackageError: naming the extra.
    """
    wanted = [("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("polygraphy", "onnx")]
    timed_in = {recipe.budget.runtime, recipe.sweep.runtime if recipe.sweep else "torch"}
    targets = recipe.matrix.targets if recipe.matrix else ()
    if any(runtime.startswith("openvino") for runtime in (*timed_in, *targets)):
        wanted.append(("openvino", "openvino"))
    if recipe.engine.enabled and recipe.engine.backend != "auto":
        from exporters.engine import EXTRAS, MODULES

        wanted.append((MODULES[recipe.engine.backend], EXTRAS[recipe.engine.backend]))
    if any(cells_of_matrix.is_gpu(target) for target in targets):
        wanted.append(("tensorrt_rtx", "tensorrt-rtx"))
    for module, extra in wanted:
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(f"{module} is not installed: pip install 'slimdiff[{extra}]'")


def _versions(names: Sequence[str]) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def summary(shop: Workshop, name: str, done: Sequence[Done]) -> dict[str, Any]:
    """What `build.json` holds, from the results of the stages."""
    folder, recipe = shop.folder, shop.recipe
    results = {stage: build_folder.read(folder, stage) for stage in ("slim", "validate", "compare", "bench")}
    cells = cells_of_matrix.results(recipe, folder)
    judged = [*judge(recipe.gates, results), *cells_of_matrix.judge_cells(recipe.gates, cells)]
    verdict = overall(judged)
    slim, bench = results["slim"], results["bench"]
    figures = {key: {side: slim[key][side] for side in ("dense", "slim")} for key in ("parameters", "macs", "bytes")}
    latency = None
    if "skipped" not in bench:
        latency = {"dense": bench["baseline"]["median_ms"], "slim": bench["candidate"]["median_ms"]}
    return build_folder.strict(
        {
            "schema": manifest.SCHEMA,
            "name": name,
            "model": public_name(recipe.model),
            "sentence": _sentence(recipe, results),
            "verdict": verdict,
            "exit_code": EXIT_CODE[verdict],
            "gates": judged,
            "figures": {**figures, "latency_ms": latency},
            "cells": cells,
            "stages": [vars(stage) for stage in done],
            "seconds": round(sum(stage.seconds for stage in done), 3),
            "versions": {"python": platform.python_version(), **manifest.versions()},
            "machine": machine(),
            "made_from": {
                "recipe": manifest.fingerprint(_public(recipe)),
                "model": manifest.read_manifest(folder / "calibrate")["made_from"]["inputs"]["model"],
                "prompts": manifest.read_manifest(folder / "calibrate")["made_from"]["inputs"]["prompts"],
            },
            "recipe": _public(recipe),
        }
    )


def _public(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.model_dump(mode="json", by_alias=True)
    settings["model"] = public_name(recipe.model)
    if isinstance(recipe.prompts, str):
        settings["prompts"] = Path(recipe.prompts).name
    return settings


def _sentence(recipe: Recipe, results: dict[str, dict[str, Any]]) -> str:
    dense, slim = (results["slim"]["parameters"][side] for side in ("dense", "slim"))
    allocation = {
        "global": "one knapsack over measured sensitivities",
        "local": "one knapsack over local errors",
        "uniform": "the same share of all",
        "softmax": "shares by block influence",
    }[recipe.plan.allocation]
    text = (
        f"slimdiff took {100 * (dense - slim) / dense:.1f} % of the parameters out of the denoiser of "
        f"{public_name(recipe.model)} ({amount(dense)} to {amount(slim)}) at {results['slim']['sites']} sites, "
        f"chosen by {allocation}, without any training"
    )
    bench = results["bench"]
    if "skipped" in bench:
        return f"{text}."
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    if low <= 1 <= high:
        return (
            f"{text}; whether a denoiser call became faster was not settled (interval {low:.2f} to {high:.2f} times)."
        )
    pace = f"{median:.2f} times faster" if low > 1 else f"slower, at {median:.2f} times the dense speed"
    return f"{text}; one denoiser call is {pace} in {bench['runtime']}."


def log_verdict(whole: dict[str, Any]) -> None:
    """Tell every gate on stderr."""
    for gate in whole["gates"]:
        log.info("gate %s: %s (%s)", gate["gate"], gate["verdict"], gate["detail"])

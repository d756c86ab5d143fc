"""The stages of a build, one function each: reads the recipe and what came before, writes into its folder."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import costs, side_by_side
from deploy.artifacts.files import save_pipeline
from deploy.artifacts.licenses import copy_licenses
from deploy.build.sensitivity import recall, write_sensitivity
from deploy.build.workshop import Workshop, denoiser_of, public_name, spread
from deploy.cli.console import log
from deploy.recipe.prompts import described
from deploy.recipe.recipe import point_budget
from slimdiff import Plan
from slimdiff.compression import with_denoiser
from slimdiff.denoising.trajectory import sample_images
from slimdiff.fidelity import compare_noise, image_fidelity
from slimdiff.storage import manifest


def write_result(folder: Path, stage: str, value: dict[str, Any]) -> None:
    """Write a stage's JSON into the folder that it is given."""
    manifest.write_json(folder / Path(build_folder.result_file(stage)).name, build_folder.strict(value))


def calibrate_step(shop: Workshop, folder: Path) -> None:
    """Statistics of the dense model's trajectories."""
    settings = shop.recipe.calibration
    refuse_impossible(shop)
    start = time.perf_counter()
    origin, steps = described(shop.prompts_from), settings.sampling.steps
    log.info("calibrate: %d prompts %s, %d steps each", len(shop.prompts), origin, steps)
    shop.new_compressor().statistics.save(folder / Path(build_folder.STATISTICS).name)
    source = shop.prompts_from
    sampling = settings.sampling
    write_result(
        folder,
        "calibrate",
        {
            "prompts": len(shop.prompts),
            "prompts_from": Path(source).name if isinstance(source, str) else "recipe",
            "calls": -(-len(shop.prompts) // sampling.batch) * sampling.steps,
            "sampling": sampling.model_dump(),
            "seconds": round(time.perf_counter() - start, 3),
        },
    )


def refuse_impossible(shop: Workshop) -> None:
    """Refuse a budget that cannot be met, the build's or a point's of its sweep, before the work that it is for.

    Raises:
        InputError: saying how much can go.
    """
    from exporters.graphs.pipeline import example_call

    recipe, sampling = shop.recipe, shop.recipe.calibration.sampling
    budgets = [recipe.budget.budget()]
    if recipe.sweep is not None:
        budgets += [point_budget(recipe.sweep.by, text) for text in recipe.sweep.budgets()]
    call = partial(example_call, shop.dense, height=sampling.height, width=sampling.width)
    shop.new_compressor().check(budgets, call=call)


def sensitivity_step(shop: Workshop, folder: Path) -> None:
    """What planning measures by forward passes, whatever the budget."""
    refuse_impossible(shop)
    write_sensitivity(shop.compressor, folder)


def plan_step(shop: Workshop, folder: Path) -> None:
    """Ranks under the budget."""
    recipe = shop.recipe
    budget = recipe.budget.budget()
    refuse_impossible(shop)
    recall(shop.statistics, shop.folder)
    latency = None
    if budget.kind == "speedup":
        from exporters.latency.table import measure_latency
        from exporters.settings import TableSettings

        table = TableSettings(runtime=recipe.budget.runtime)
        latency = measure_latency(denoiser_of(shop.dense), shop.trajectory[0], recipe.plan, table)
        write_result(
            folder, "latency", {"made_from": latency.made_from, "dense_ms": latency.dense, "layers": latency.layers}
        )
    shop.compressor.plan(budget, latency).save(folder / Path(build_folder.PLAN).name)


def slim_step(shop: Workshop, folder: Path) -> None:
    """The slim model, a diffusers pipeline directory."""
    plan, dense = shop.plan, denoiser_of(shop.dense)
    recipe = shop.recipe
    start = time.perf_counter()
    slim = shop.compressor.slim(plan)
    seconds = round(time.perf_counter() - start, 3)
    save_pipeline(shop.compressor.pipeline_with(slim), folder)
    copy_licenses(recipe.model, folder)
    call = shop.trajectory[0]
    calibrated, sensitivity, planned = (
        manifest.read_manifest(shop.folder / stage)["made_from"]["seconds"]
        for stage in ("calibrate", "sensitivity", "plan")
    )
    took = {"calibrate": calibrated, "plan": round(sensitivity + planned, 3), "slim": seconds}
    write_result(folder, "slim", compression_result(plan, costs(dense, call), costs(slim, call), took))


def compression_result(
    plan: Plan, dense: dict[str, int], slim: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    """What `slimdiff compress` reports, without `out`.

    `parameters.budget` is what slim was to have; where the budget is in another unit, what the plan gives it.
    """
    figures: dict[str, Any] = side_by_side(dense, slim)
    figures["parameters"]["budget"] = plan.parameters.get("budget", plan.parameters["slim"])
    sites = sum(site.rank < site.dense_rank for site in plan.sites.values())
    return {
        **figures,
        "budget": plan.budget,
        "predicted": plan.costs,
        "noise_error": plan.noise_error,
        "sites": sites,
        "left_dense": plan.left_dense,
        "seconds": seconds,
    }


def export_step(shop: Workshop, folder: Path) -> None:
    """ONNX of the dense and the slim denoiser, with the shapes of the calls for one image, or as many as there are."""
    from exporters.graphs.export import export_unet
    from exporters.graphs.precision import fp32_islands

    settings = shop.recipe.export
    result: dict[str, Any] = {"precision": settings.precision}
    for name in shop.exported:
        pipeline = shop.dense if name == "dense" else shop.slim
        log.info("export: %s to ONNX, %s", name, settings.precision)
        start = time.perf_counter()
        export_unet(denoiser_of(pipeline), folder / name, shop.trajectory[0], settings)
        seconds = round(time.perf_counter() - start, 3)
        made_from = {"model": public_name(shop.recipe.model), "denoiser": name, "settings": settings.model_dump()}
        inputs = shapes(shop.trajectory[0])
        wide = fp32_islands(folder / name / "model.onnx")
        runs_on = {"precision": settings.precision, "shapes": inputs, "opset": settings.opset, "fp32_islands": wide}
        manifest.write_manifest(folder / name, "onnx", made_from, runs_on)
        size = sum(f.stat().st_size for f in (folder / name).glob("model.onnx*"))
        written = {"folder": f"export/{name}", "bytes": size, "inputs": inputs, "seconds": seconds}
        result[name] = {**written, "fp32_islands": wide}
    write_result(folder, "export", result)


def shapes(call: Any) -> dict[str, list[int]]:
    """Shapes of the graph's inputs for a recorded call."""
    from exporters.graphs.export import unet_inputs

    return {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}


def engine_step(shop: Workshop, folder: Path) -> None:
    """The engine of the slim graph in fp16, or the reason why there is none."""
    reason = no_engine(shop)
    if reason is not None:
        log.info("engine: skipped, %s", reason)
        write_result(folder, "engine", {"skipped": reason})
        return
    from exporters.engine import request_engine
    from exporters.graphs.export import export_unet
    from exporters.settings import EngineSettings

    graph = shop.folder / "export" / "slim" / "model.onnx"
    if shop.recipe.export.precision != shop.engine_precision:
        log.info("engine: exporting the slim denoiser in %s", shop.engine_precision)
        half = shop.recipe.export.model_copy(update={"precision": shop.engine_precision, "dynamic_batch": False})
        graph = export_unet(denoiser_of(shop.slim), folder / "onnx-fp16", shop.trajectory[0], half)
    settings = EngineSettings(**shop.recipe.engine.model_dump(exclude={"enabled"}))
    request = request_engine(graph, settings, plan=shop.plan)
    before = shop.folder / "engine"
    why = "it was asked for" if "engine" in shop.forced else request.why_build(before)
    if why is None:
        log.info("engine: the one from before is the same")
        request.reuse(before, folder)
    else:
        log.info("engine: built, because %s", why)
        request.build(folder)


def engine_runs_on(folder: Path) -> dict[str, Any]:
    """What the manifest says of where the engine runs; nothing if there is none."""
    from exporters.engine.check import runs_on

    report = manifest.read_json(folder / "engine.json")
    return {} if "skipped" in report else runs_on(report)


def export_runs_on(folder: Path) -> dict[str, Any]:
    """What the manifest says of where the graphs run."""
    report = manifest.read_json(folder / "export.json")
    return {"precision": report["precision"], "shapes": report["slim"]["inputs"]}


def engine_gpu(shop: Workshop) -> str:
    """The GPU that the engine is built for; empty if its targets are named, or there is none."""
    from exporters.engine import gpu_here

    gpu = None if shop.recipe.engine.targets or not shop.recipe.engine.enabled else gpu_here()
    return "" if gpu is None else f"{gpu.name} {gpu.capability} {gpu.driver}"


def no_engine(shop: Workshop) -> str | None:
    """Why there will be no engine; None if there will be one."""
    from exporters.engine import MODULES, available_backend, has_gpu

    stage = shop.recipe.engine
    if not stage.enabled:
        return "the recipe says so (engine.enabled: false)"
    if stage.backend == "auto" and available_backend() is not None and not stage.targets and not has_gpu():
        return "there is no GPU here to build for, and the recipe names no engine.targets, such as sm89"
    if stage.backend == "auto" and available_backend() is None:
        return f"no backend is installed ({' or '.join(MODULES.values())}): pip install 'slimdiff[tensorrt-rtx]'"
    return None


def validate_step(shop: Workshop, folder: Path) -> None:
    """Parity with the fp32 torch model: the exported slim model, and the fp16 graph if there is one for the engine."""
    from exporters.runtimes.unet import UNet
    from exporters.validation.graph import check_graph
    from exporters.validation.parity import check_trajectory, with_checks

    calls = spread(shop.trajectory, shop.recipe.validation.calls)
    graphs = [shop.folder / "export" / "slim"]
    if (shop.folder / "engine" / "onnx-fp16").is_dir():
        graphs.append(shop.folder / "engine" / "onnx-fp16")
    captions, sampling = shop.together
    parts = []
    title = "OpenVINO" if shop.runtime.startswith("openvino") else "ONNX Runtime"
    for graph in graphs:
        unet = UNet.open(graph, shop.runtime)
        precision: Any = unet.session.precision
        log.info("validate: %s in %s against fp32 in torch, %d calls", precision, title, len(calls))
        file = graph / "model.onnx"
        found = check_graph(file, denoiser_of(shop.slim), calls, unet.predict, precision)
        exported = with_denoiser(shop.slim, unet)
        images = check_trajectory(shop.slim, exported, captions, sampling)
        found = with_checks(found, images)
        parts.append({"name": f"slim in {title} ({precision}) against slim in torch (fp32)", **found})
    write_result(
        folder,
        "validate",
        {
            "passed": all(part["passed"] for part in parts),
            "precision": parts[0]["precision"],
            "checks": [check for part in parts for check in part["checks"]],
            "first_diverging": next((p["first_diverging"] for p in parts if p["first_diverging"]), None),
            "divergence": next((p["divergence"] for p in parts if p["divergence"]), None),
            "calls": len(calls),
            "timesteps": [call.timestep for call in calls],
            "parts": parts,
        },
    )


def compare_step(shop: Workshop, folder: Path) -> None:
    """Fidelity of slim against dense: noise prediction, images, and quality where there is an evaluator."""
    from exporters.runtimes.unet import UNet

    settings = shop.recipe.compare
    captions = shop.captions[: settings.images]
    shown = min(settings.shown, len(captions))
    noise = compare_noise(shop.dense, shop.slim, shop.captions[: settings.trajectories], settings.sampling)
    images = {
        name: sample_images(pipeline, captions, settings.sampling, progress=f"compare: {name}")
        for name, pipeline in (("dense", shop.dense), ("slim", shop.slim))
    }
    if shown:  # the graph has the shapes of one image
        one = settings.sampling.model_copy(update={"batch": 1})
        exported = with_denoiser(shop.slim, UNet.open(shop.folder / "export" / "slim"))
        images["slim_onnx"] = sample_images(exported, captions[:shown], one, progress="compare: slim in ONNX Runtime")
    (folder / "images").mkdir()
    pictures = []
    for i, caption in enumerate(captions[:shown]):
        picture: dict[str, Any] = {"caption": caption, "seed": settings.sampling.seed + i}
        for name, made in images.items():
            made[i].save(folder / "images" / f"{i:02d}-{name}.png")
            picture[name] = f"{build_folder.IMAGES}/{i:02d}-{name}.png"
        pictures.append(picture)
    write_result(
        folder,
        "compare",
        {
            "noise_error": noise,
            "images": image_fidelity(images["dense"], images["slim"]),
            "images_onnx": image_fidelity(images["slim"][:shown], images["slim_onnx"]) if shown else None,
            "quality": quality(images["dense"], images["slim"], settings.captions_seed) if shop.judged else {},
            "sampling": settings.sampling.model_dump(),
            "pictures": pictures,
        },
    )


def quality(dense: list[Any], slim: list[Any], seed: int) -> dict[str, Any]:
    """What the embedded model's evaluator says of both sets of images."""
    from slimdiff import embedded

    seen = {name: embedded.quality(images, seed) for name, images in (("dense", dense), ("slim", slim))}
    direction = {"caption_accuracy": ("share", "higher"), "frechet_distance": ("", "lower")}
    return {
        metric: {
            "dense": seen["dense"][metric],
            "slim": seen["slim"][metric],
            "unit": direction.get(metric, ("", ""))[0],
            "better": direction.get(metric, ("", ""))[1],
            "count": len(dense),
        }
        for metric in seen["dense"]
    }


def bench_step(shop: Workshop, folder: Path) -> None:
    """Paired latency of the dense and the slim graph in ONNX Runtime."""
    from exporters.graphs.export import unet_inputs
    from exporters.latency.decision import Gate
    from exporters.latency.measure import bench
    from exporters.latency.pair import Job

    call = shop.trajectory[len(shop.trajectory) // 2]
    shapes = {name: list(tensor.shape) for name, tensor in unet_inputs(call).items()}  # where the graphs are open
    dense, slim = (
        Job(name, str(shop.folder / "export" / name / "model.onnx"), shop.runtime, shapes) for name in ("dense", "slim")
    )
    bound = shop.recipe.gates.min_speedup
    result = bench(dense, slim, shop.recipe.bench, gate=None if bound is None else Gate("speedup", bound))
    write_result(folder, "bench", result)

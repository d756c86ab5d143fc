"""What a build comes to: its gates, which pass, fail or are inconclusive, its figures, and one sentence for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from deploy.artifacts import build_folder
from deploy.artifacts.figures import machine, made_now
from deploy.artifacts.hashes import public_name
from deploy.artifacts.numbers import amount
from deploy.build.cells import results_of_cells
from deploy.build.stages import Done, Stage
from deploy.recipe.material import PICTURES
from deploy.recipe.recipe import Gates, Recipe
from exporters.latency.decision import Gate
from slimdiff.storage import manifest

EXIT_CODE = {"pass": 0, "fail": 1, "inconclusive": 4}
_ALLOCATIONS = {
    "global": "one knapsack over measured sensitivities",
    "local": "one knapsack over local errors",
    "uniform": "the same share of all",
    "softmax": "shares by block influence",
}


def summary(recipe: Recipe, folder: Path, name: str, stages: Sequence[Stage], done: Sequence[Done]) -> dict[str, Any]:
    """What `build.json` holds, from the results of the stages."""
    figures: dict[str, Any] = {}
    for stage in stages:
        if stage.figures is not None:
            figures |= stage.figures(build_folder.read(folder, stage.name))
    results = {stage: build_folder.read(folder, stage) for stage in ("slim", "validate", "compare", "bench")}
    cells = results_of_cells(recipe, folder)
    gates = judge(recipe.gates, results, cells)
    verdict = overall(gates)
    calibrated = manifest.read_manifest(folder / "calibrate")["made_from"]["inputs"]
    settings = recipe.model_dump(mode="json", by_alias=True) | {"model": public_name(recipe.model)}
    named = {name: getattr(recipe, name) for name in ("prompts", "schedule", *PICTURES)}
    settings |= {name: Path(value).name for name, value in named.items() if isinstance(value, str)}
    settings["lora"] = [one | {"file": Path(one["file"]).name} for one in settings["lora"]]
    for metric in settings["compare"]["metrics"].values():
        metric["weights"] = metric["weights"] and Path(metric["weights"]).name
    if recipe.compare.reference is not None:
        settings["compare"]["reference"] = Path(recipe.compare.reference).name
    return build_folder.strict(
        {
            "schema": manifest.SCHEMA,
            "name": name,
            "model": public_name(recipe.model),
            "sentence": sentence(recipe, results),
            "verdict": verdict,
            "exit_code": EXIT_CODE[verdict],
            "gates": gates,
            "figures": figures,
            "cells": cells,
            "stages": [vars(stage) for stage in done],
            "seconds": round(sum(stage.seconds for stage in done), 3),
            **made_now(),
            "machine": machine(),
            "made_from": {
                "recipe": manifest.fingerprint(settings),
                "model": calibrated["model"],
                "prompts": calibrated["prompts"],
            },
            "recipe": settings,
        }
    )


def judge(
    gates: Gates, results: Mapping[str, Mapping[str, Any]], cells: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Every gate that the recipe has, with the value that it bounds.

    Args:
        results: `validate`, `compare` and `bench` as their stages returned them.
        cells: what came of the cells of the matrix; each has a gate of parity, too.
    """
    compare, judged = results["compare"], []
    if gates.parity:
        judged.append(_parity("parity", "the exported slim model", results["validate"]))
    if gates.min_speedup is not None:
        judged.append(_speedup(results["bench"], gates.min_speedup))
    if gates.max_quality_loss is not None:
        judged.append(_quality(compare["quality"].get("caption_accuracy"), gates.max_quality_loss))
    if (bound := gates.max_noise_error) is not None:
        value = compare["noise_error"]["relative_mse"]
        detail = "relative mean squared change of the noise prediction on the dense model's trajectory"
        holds = value is not None and value <= bound
        judged.append(_gate("noise_error", "Noise-prediction error", value, bound, "lower", "", holds, detail))
    if (bound := gates.min_psnr_db) is not None:
        value = compare["images"]["psnr_db"]  # null: the images are identical
        found = compare["images"].get("metrics", {}).get("psnr")
        detail = f"slim images against dense ones, same captions and seeds{_between(found)}"
        holds = _held(inf if value is None else value, _ends(found), bound, "higher")
        judged.append(_gate("psnr_db", "PSNR to dense", value, bound, "higher", "dB", holds, detail))
    judged += [_metric(key, name, getattr(gates, key), compare) for key, name in gates.metrics().items()]
    if gates.parity:
        judged += [_parity(f"parity/{cell['name']}", cell["name"], cell["parity"]) for cell in cells]
    return judged


def overall(judged: Sequence[Mapping[str, Any]]) -> str:
    """`fail` if any gate failed, else `inconclusive` if any is, else `pass`."""
    return max((gate["verdict"] for gate in judged), key=("pass", "inconclusive", "fail").index, default="pass")


def _gate(
    gate: str, name: str, value: Any, bound: Any, better: str, unit: str, verdict: bool | str, detail: str
) -> dict[str, Any]:
    if isinstance(verdict, bool):
        verdict = "pass" if verdict else "fail"
    result = {"gate": gate, "name": name, "value": value, "bound": bound, "better": better, "unit": unit}
    return {**result, "verdict": verdict, "detail": detail}


def _parity(gate: str, name: str, validate: Mapping[str, Any]) -> dict[str, Any]:
    checks = validate["checks"]
    failed = [c for c in checks if not c["passed"]]
    detail = f"{len(checks) - len(failed)} of {len(checks)} checks hold"
    if failed:
        worst = failed[0]
        detail += f"; {worst['metric']} of {worst['tensor']} is {worst['value']}, bound {worst['bound']}"
        advice = (validate.get("divergence") or {}).get("advice")
        detail += f"; {advice}" if advice else ""
    passed = bool(validate["passed"])
    return _gate(gate, f"Parity of {name}", passed, True, "true", "", passed, detail)


def _speedup(bench: Mapping[str, Any], bound: float) -> dict[str, Any]:
    low, high, value = (bench["speedup"][k] for k in ("low", "high", "median"))
    verdict, detail = Gate("speedup", bound).verdict(low, high), f"95 % interval {low:.3f} to {high:.3f}"
    return _gate("speedup", "Speedup over dense", value, bound, "higher", "x", verdict, detail)


def _metric(key: str, name: str, bound: float, compare: Mapping[str, Any]) -> dict[str, Any]:
    """The gate of one of the metrics of images: of slim against dense, or of the slim side where each is judged."""
    if name in compare["quality"]:
        found = compare["quality"][name]
        low, high = found["intervals"]["slim"] or (None, None)
        value, detail = found["slim"], f"slim images; {found['dense']:.4g} dense"
        found = found | {"low": low, "high": high}
    else:
        found = compare["images"]["metrics"][name]
        value, detail = found["value"], "slim images against dense ones, same captions and seeds"
    better = "higher" if key.startswith("min_") else "lower"
    holds = "fail" if value is None else _held(value, _ends(found), bound, better)
    detail += _between(found)
    return _gate(name, f"{name.upper().replace('_', '-')} of slim images", value, bound, better, "", holds, detail)


def _held(value: float, ends: tuple[float | None, float | None], bound: float, better: str) -> str:
    """As for a latency, where there is an interval: pass if all of it keeps the bound, fail if all of it breaks it."""
    low, high = (value if end is None else end for end in ends)
    if better == "lower":
        low, high, bound = -high, -low, -bound
    return "pass" if low >= bound else "fail" if high < bound else "inconclusive"


def _ends(found: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """A figure's interval; None where there is none, as of one image."""
    return (found.get("low"), found.get("high")) if found else (None, None)


def _between(found: Mapping[str, Any] | None) -> str:
    low, high = _ends(found)
    if found is None or low is None or high is None:
        return ""
    return f"; 95 % interval {low:.4g} to {high:.4g}, {found['count']} images"


def _quality(accuracy: Mapping[str, Any] | None, bound: float) -> dict[str, Any]:
    loss: float | None = None
    verdict: bool | str = "inconclusive"
    detail = "this model has no evaluator: gate it by max_noise_error or min_psnr_db"
    if accuracy is not None:
        dense, slim = accuracy["dense"], accuracy["slim"]
        loss = 100 * (dense - slim)
        detail = f"{100 * dense:.1f} % dense, {100 * slim:.1f} % slim, {accuracy['count']} captions"
        gained, lost = _ends(accuracy)
        ends = (None, None) if gained is None or lost is None else (-100 * lost, -100 * gained)
        verdict = _held(loss, ends, bound, "lower")
        detail += "" if ends[0] is None else f"; 95 % interval of the loss {ends[0]:.2f} to {ends[1]:.2f}"
    return _gate("quality_loss", "Loss of caption accuracy", loss, bound, "lower", "points", verdict, detail)


def sentence(recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The build in one sentence, which claims no speed that was not measured."""
    dense, slim = (results["slim"]["parameters"][side] for side in ("dense", "slim"))
    text = (
        f"slimdiff took {100 * (dense - slim) / dense:.1f} % of the parameters out of the denoiser of "
        f"{public_name(recipe.model)} ({amount(dense)} to {amount(slim)}) at {results['slim']['sites']} sites, "
        f"chosen by {_ALLOCATIONS[recipe.plan.allocation]}, without any training"
    )
    bench = results["bench"]
    low, median, high = (bench["speedup"][k] for k in ("low", "median", "high"))
    if low <= 1 <= high:
        return (
            f"{text}; whether a denoiser call became faster was not settled (interval {low:.2f} to {high:.2f} times)."
        )
    pace = f"{median:.2f} times faster" if low > 1 else f"slower, at {median:.2f} times the dense speed"
    return f"{text}; one denoiser call is {pace} in {bench['runtime']}."

"""What a build must hold to, judged from its results: pass, fail or inconclusive, and the exit code that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.recipe.recipe import Gates
from exporters.latency.decision import Gate

EXIT_CODE = {"pass": 0, "fail": 1, "inconclusive": 4}


def judge(gates: Gates, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every gate that is asked for, with the value it was held against.

    Args:
        gates: the recipe's.
        results: `validate`, `compare` and `bench` as their stages wrote them.
    """
    judged = []
    if gates.parity:
        judged.append(parity(results["validate"]))
    if gates.min_speedup is not None:
        judged.append(_speedup(results["bench"], gates.min_speedup))
    if gates.max_quality_loss is not None:
        judged.append(_quality(results["compare"], gates.max_quality_loss))
    if gates.max_noise_error is not None:
        value = results["compare"]["noise_error"]["relative_mse"]
        verdict = _verdict(value is not None and value <= gates.max_noise_error)
        detail = "relative mean squared change of the noise prediction on the dense model's trajectory"
        judged.append(
            _gate("noise_error", "Noise-prediction error", value, gates.max_noise_error, "lower", "", verdict, detail)
        )
    if gates.min_psnr_db is not None:
        value = results["compare"]["images"]["psnr_db"]  # null: the images are identical
        verdict = _verdict(value is None or value >= gates.min_psnr_db)
        detail = "slim images against dense ones, same captions and seeds"
        judged.append(_gate("psnr_db", "PSNR to dense", value, gates.min_psnr_db, "higher", "dB", verdict, detail))
    return judged


def overall(judged: Sequence[Mapping[str, Any]]) -> str:
    """`fail` if any gate failed, else `inconclusive` if any is, else `pass`."""
    verdicts = {gate["verdict"] for gate in judged}
    return next((v for v in ("fail", "inconclusive") if v in verdicts), "pass")


def _verdict(holds: bool) -> str:
    return "pass" if holds else "fail"


def _gate(
    gate: str, name: str, value: Any, bound: Any, better: str, unit: str, verdict: str, detail: str
) -> dict[str, Any]:
    return {
        "gate": gate,
        "name": name,
        "value": value,
        "bound": bound,
        "better": better,
        "unit": unit,
        "verdict": verdict,
        "detail": detail,
    }


def parity(validate: Mapping[str, Any], cell: str | None = None) -> dict[str, Any]:
    """The gate of parity, of the build or of a cell of its matrix."""
    checks = validate["checks"]
    failed = [c for c in checks if not c["passed"]]
    detail = f"{len(checks) - len(failed)} of {len(checks)} checks hold"
    if failed:
        worst = failed[0]
        detail += f"; {worst['metric']} of {worst['tensor']} is {worst['value']}, bound {worst['bound']}"
    passed = bool(validate["passed"])
    gate, name = ("parity", "the exported slim model") if cell is None else (f"parity/{cell}", cell)
    return _gate(gate, f"Parity of {name}", passed, True, "true", "", _verdict(passed), detail)


def _speedup(bench: Mapping[str, Any], bound: float) -> dict[str, Any]:
    name = "Speedup over dense"
    if "skipped" in bench:
        return _gate("speedup", name, None, bound, "higher", "x", "inconclusive", f"not measured: {bench['skipped']}")
    low, high, median = (bench["speedup"][k] for k in ("low", "high", "median"))
    detail = f"95 % interval {low:.3f} to {high:.3f}"
    verdict = Gate("speedup", bound).verdict(low, high)
    return _gate("speedup", name, median, bound, "higher", "x", verdict, detail)


def _quality(compare: Mapping[str, Any], bound: float) -> dict[str, Any]:
    name = "Loss of caption accuracy"
    accuracy = compare["quality"].get("caption_accuracy")
    if accuracy is None:
        detail = "this model has no evaluator: gate it by max_noise_error or min_psnr_db"
        return _gate("quality_loss", name, None, bound, "lower", "points", "inconclusive", detail)
    loss = 100 * (accuracy["dense"] - accuracy["slim"])
    detail = f"{100 * accuracy['dense']:.1f} % dense, {100 * accuracy['slim']:.1f} % slim, {accuracy['count']} captions"
    return _gate("quality_loss", name, loss, bound, "lower", "points", _verdict(loss <= bound), detail)

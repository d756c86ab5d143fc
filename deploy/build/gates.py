"""What a build must hold to, judged from its results: pass, fail or inconclusive, and the exit code that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploy.recipe.recipe import Gates
from exporters.latency.decision import Gate

EXIT_CODE = {"pass": 0, "fail": 1, "inconclusive": 4}


def judge(gates: Gates, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every gate that the recipe has, with the value that it bounds.

    Args:
        gates: the recipe's.
        results: `validate`, `compare` and `bench` as their stages wrote them.
    """
    compare = results["compare"]
    judged = []
    if gates.parity:
        judged.append(parity(results["validate"]))
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
        detail = "slim images against dense ones, same captions and seeds"
        holds = value is None or value >= bound
        judged.append(_gate("psnr_db", "PSNR to dense", value, bound, "higher", "dB", holds, detail))
    return judged


def overall(judged: Sequence[Mapping[str, Any]]) -> str:
    """`fail` if any gate failed, else `inconclusive` if any is, else `pass`."""
    verdicts = {gate["verdict"] for gate in judged}
    return next((v for v in ("fail", "inconclusive") if v in verdicts), "pass")


def _gate(
    gate: str, name: str, value: Any, bound: Any, better: str, unit: str, verdict: bool | str, detail: str
) -> dict[str, Any]:
    if isinstance(verdict, bool):
        verdict = "pass" if verdict else "fail"
    result = {"gate": gate, "name": name, "value": value, "bound": bound, "better": better, "unit": unit}
    return {**result, "verdict": verdict, "detail": detail}


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
    return _gate(gate, f"Parity of {name}", passed, True, "true", "", passed, detail)


def _speedup(bench: Mapping[str, Any], bound: float) -> dict[str, Any]:
    value, verdict, detail = None, "inconclusive", f"not measured: {bench.get('skipped')}"
    if "skipped" not in bench:
        low, high, value = (bench["speedup"][k] for k in ("low", "high", "median"))
        verdict, detail = Gate("speedup", bound).verdict(low, high), f"95 % interval {low:.3f} to {high:.3f}"
    return _gate("speedup", "Speedup over dense", value, bound, "higher", "x", verdict, detail)


def _quality(accuracy: Mapping[str, Any] | None, bound: float) -> dict[str, Any]:
    loss: float | None = None
    verdict: bool | str = "inconclusive"
    detail = "this model has no evaluator: gate it by max_noise_error or min_psnr_db"
    if accuracy is not None:
        dense, slim = accuracy["dense"], accuracy["slim"]
        loss = 100 * (dense - slim)
        verdict = loss <= bound
        detail = f"{100 * dense:.1f} % dense, {100 * slim:.1f} % slim, {accuracy['count']} captions"
    return _gate("quality_loss", "Loss of caption accuracy", loss, bound, "lower", "points", verdict, detail)

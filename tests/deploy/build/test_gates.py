"""Gates: what passes, what fails, and what cannot be told."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.build.verdict import EXIT_CODE, judge, overall, sentence
from deploy.recipe.recipe import Gates, Recipe


def results(**changes: Any) -> dict[str, dict[str, Any]]:
    check = {"tensor": "out", "metric": "cosine", "value": 1.0, "bound": 0.999, "passed": True}
    found: dict[str, dict[str, Any]] = {
        "validate": {"passed": True, "checks": [check]},
        "compare": {
            "noise_error": {"relative_mse": 1e-3},
            "images": {
                "psnr_db": 35.0,
                "metrics": {
                    "ssim": {"value": 0.9, "low": 0.8, "high": 0.95, "count": 100},
                    "lpips": {"value": 0.1, "low": 0.08, "high": 0.12, "count": 100},
                    "fid": {"value": 12.0, "low": 10.0, "high": 14.0, "count": 100},
                    "psnr": {"value": 35.0, "low": 34.0, "high": 36.0, "count": 100},
                },
            },
            "quality": {
                "caption_accuracy": {"dense": 0.93, "slim": 0.92, "low": -0.02, "high": 0.005, "count": 100},
                "clip": {"dense": 30.0, "slim": 29.0, "count": 100, "intervals": {"slim": [28.0, 29.5]}},
            },
        },
        "bench": {"speedup": {"median": 1.1, "low": 1.08, "high": 1.12}},
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("gates", "verdict"),
    [
        (Gates(parity=False), "pass"),
        (Gates(), "pass"),
        (Gates(min_speedup=1.05), "pass"),
        (Gates(min_speedup=1.1), "inconclusive"),
        (Gates(min_speedup=1.2), "fail"),
        (Gates(max_quality_loss=2.1), "pass"),  # the interval of the loss is -0.5 to 2 points
        (Gates(max_quality_loss=1.5), "inconclusive"),
        (Gates(max_quality_loss=0.5), "inconclusive"),
        (Gates(max_noise_error=1e-3), "pass"),
        (Gates(max_noise_error=9e-4), "fail"),
        (Gates(min_psnr_db=34), "pass"),
        (Gates(min_psnr_db=35), "inconclusive"),
        (Gates(min_psnr_db=36.1), "fail"),
        (Gates(min_psnr_db=36.1, min_speedup=1.1), "fail"),
        (Gates(min_ssim=0.8), "pass"),
        (Gates(min_ssim=0.9), "inconclusive"),
        (Gates(min_ssim=0.96), "fail"),
        (Gates(max_lpips=0.12), "pass"),
        (Gates(max_lpips=0.11), "inconclusive"),
        (Gates(max_lpips=0.07), "fail"),
        (Gates(min_clip=28), "pass"),
        (Gates(min_clip=29.5), "inconclusive"),
        (Gates(min_clip=29.6), "fail"),
        (Gates(max_fid=14), "pass"),
        (Gates(max_fid=9.9), "fail"),
    ],
)
def test_verdicts(gates, verdict):
    assert overall(judge(gates, results())) == verdict


def test_a_loss_is_judged_by_its_interval_and_by_its_value_where_there_is_none():
    found = results()
    accuracy = found["compare"]["quality"]["caption_accuracy"]
    accuracy |= {"low": -0.04, "high": -0.015}  # all of it is lost
    (gate,) = judge(Gates(parity=False, max_quality_loss=1.4), found)
    assert gate["verdict"] == "fail" and gate["value"] == pytest.approx(1)
    assert gate["detail"].endswith("100 captions; 95 % interval of the loss 1.50 to 4.00")
    accuracy |= {"low": None, "high": None}
    for bound, verdict in ((1.1, "pass"), (0.9, "fail")):
        assert judge(Gates(parity=False, max_quality_loss=bound), found)[0]["verdict"] == verdict


def test_exit_codes():
    assert EXIT_CODE == {"pass": 0, "fail": 1, "inconclusive": 4}


def test_only_gates_that_are_asked_for_are_judged():
    assert [g["gate"] for g in judge(Gates(min_speedup=1.0), results())] == ["parity", "speedup"]


def test_a_gate_of_a_metric_says_its_interval_and_what_it_is_of():
    lpips, clip = judge(Gates(parity=False, max_lpips=0.2, min_clip=29.5), results())
    assert lpips["gate"] == "lpips" and lpips["better"] == "lower" and "against dense" in lpips["detail"]
    assert clip["verdict"] == "inconclusive" and clip["value"] == 29
    assert clip["detail"] == "slim images; 30 dense; 95 % interval 28 to 29.5, 100 images"


def test_failed_parity_names_the_check():
    check = {"tensor": "out@t=1", "metric": "cosine", "value": 0.5, "bound": 0.999, "passed": False}
    gate = judge(Gates(), results(validate={"passed": False, "checks": [check]}))[0]
    assert gate["verdict"] == "fail" and "cosine of out@t=1 is 0.5, bound 0.999" in gate["detail"]


def test_what_was_not_measured_is_inconclusive():
    quality = {"noise_error": {"relative_mse": 0.0}, "images": {"psnr_db": None}, "quality": {}}
    found = results(compare=quality)
    assert overall(judge(Gates(max_quality_loss=1.0), found)) == "inconclusive"


def test_identical_images_pass_and_an_undefined_error_fails():
    found = {"noise_error": {"relative_mse": None}, "images": {"psnr_db": None}, "quality": {}}
    assert overall(judge(Gates(min_psnr_db=40), results(compare=found))) == "pass"
    assert overall(judge(Gates(max_noise_error=1.0), results(compare=found))) == "fail"


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [(1.1, 1.2, 1.3, "1.20 times faster"), (0.9, 1.05, 1.2, "not settled"), (0.7, 0.8, 0.9, "slower")],
)
def test_the_sentence_claims_no_speed_that_was_not_measured(low, median, high, said):
    results = {
        "slim": {"parameters": {"dense": 100, "slim": 88}, "sites": 3},
        "bench": {"speedup": {"low": low, "median": median, "high": high}, "runtime": "ONNX Runtime"},
    }
    assert said in sentence(Recipe.model_validate({"model": "demo", "budget": {"reduce": "12%"}}), results)

"""Parity passes for the right model and fails for every wrong one that we could think of."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from exporters.validation.parity import BOUNDS, Bounds, check_calls, check_images, image_psnr
from slimdiff.denoising.trajectory import Call, predict
from slimdiff.errors import InputError

pytest.importorskip("polygraphy", reason="parity is measured by Polygraphy")

LAYER = "mid_block.attentions.0.transformer_blocks.0"


def of(unet):
    return lambda call: predict(unet, call)


def noise_on(weight: torch.Tensor, share: float) -> None:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight.data += noise * (share * weight.norm() / noise.norm())


def one_percent(path: str):
    return lambda unet: noise_on(unet.get_submodule(path).weight, 0.01)


def transposed(unet) -> None:
    linear = unet.get_submodule(f"{LAYER}.attn1.to_v")
    linear.weight.data = linear.weight.data.T.contiguous()


def wrong_scale(unet) -> None:
    """What forgetting to fold sqrt(r / d) into the queries would do."""
    unet.get_submodule(f"{LAYER}.attn1.to_q").weight.data *= 2**0.5


def swapped(unet) -> None:
    block = unet.get_submodule(f"{LAYER}.attn2")
    block.to_k, block.to_v = block.to_v, block.to_k


FAULTS = {
    "1 % on a value projection": one_percent(f"{LAYER}.attn1.to_v"),
    "1 % on a feed-forward": one_percent(f"{LAYER}.ff.net.2"),
    "1 % on a convolution": one_percent("mid_block.resnets.0.conv1"),
    "1 % on the last convolution": one_percent("conv_out"),
    "transposed matrix": transposed,
    "wrong softmax scale": wrong_scale,
    "keys and values swapped": swapped,
}


def test_a_model_is_itself(sharp, calls):
    result = check_calls(calls, of(sharp), of(copy.deepcopy(sharp)), "fp32")
    assert result["passed"] and result["first_diverging"] is None and result["precision"] == "fp32"
    assert [c["tensor"] for c in result["checks"][::3]] == [f"out_sample@t={call.timestep}" for call in calls]
    assert {c["metric"] for c in result["checks"]} == {"finite", "cosine", "relative_l2"}
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("name", ["dense", "slim"])
def test_onnx_runtime_is_the_model(exported, dense, slim_and_plan, calls, name):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime needs the extra onnx")
    from exporters.runtimes.unet import UNet

    reference = of({"dense": dense, "slim": slim_and_plan[0]}[name])
    assert check_calls(calls, reference, UNet.open(exported[name]).predict, "fp32")["passed"]
    half = UNet.open(exported[f"{name}-fp16"]).predict
    assert check_calls(calls, reference, half, "fp16")["passed"]
    assert not check_calls(calls, reference, half, "fp32")["passed"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_model_fails_in_fp32(sharp, calls, fault):
    wrong = copy.deepcopy(sharp)
    FAULTS[fault](wrong)
    result = check_calls(calls, of(sharp), of(wrong), "fp32")
    assert not result["passed"]
    assert result["first_diverging"] == f"out_sample@t={calls[0].timestep}"


@pytest.mark.parametrize("fault", ["transposed matrix", "keys and values swapped"])
def test_a_wrong_model_fails_in_fp16(sharp, calls, fault):
    wrong = copy.deepcopy(sharp)
    FAULTS[fault](wrong)
    assert not check_calls(calls, of(sharp), of(wrong), "fp16")["passed"]


@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_with_their_step(dense, calls, side, value):
    def breaks(call: Call) -> torch.Tensor:
        noise = predict(dense, call)
        noise[0, 0, 0, :3] = value if call.timestep == calls[1].timestep else noise[0, 0, 0, :3]
        return noise

    sides = {"reference": of(dense), "candidate": of(dense)} | {side: breaks}
    result = check_calls(calls, precision="fp16", **sides)
    failed = [c for c in result["checks"] if not c["passed"]]
    assert result["first_diverging"] == f"out_sample@t={calls[1].timestep}"
    assert {c["tensor"] for c in failed} == {result["first_diverging"]}
    assert failed[0]["metric"] == "finite" and failed[0]["value"] == 3
    json.dumps(result, allow_nan=False)


def test_both_sides_broken_alike_do_not_pass(dense, calls):
    def zeros_over_zero(call: Call) -> torch.Tensor:
        return predict(dense, call) * float("nan")

    assert not check_calls(calls, zeros_over_zero, zeros_over_zero, "fp16")["passed"]


def test_a_black_image_is_no_match(dense, calls):
    black = check_calls(calls, of(dense), lambda call: torch.zeros(2, 4, 8, 8), "fp16")
    assert not black["passed"]


def test_another_scale_is_no_match_though_the_cosine_is_1(dense, calls):
    result = check_calls(calls, of(dense), lambda call: 1.02 * predict(dense, call), "fp16")
    assert [c["metric"] for c in result["checks"] if not c["passed"]] == ["relative_l2"] * len(calls)


def test_another_shape_is_no_match(dense, calls):
    result = check_calls(calls, of(dense), lambda call: predict(dense, call)[:1], "fp32")
    assert result["checks"][0] == {
        "tensor": "out_sample@t=981",
        "metric": "shape",
        "value": [1, 4, 8, 8],
        "bound": [2, 4, 8, 8],
        "passed": False,
    }


def test_batches_at_the_same_time_keep_their_own_names(dense, calls):
    result = check_calls([calls[0], calls[0]], of(dense), of(dense), "fp32")
    assert {c["tensor"] for c in result["checks"]} == {"out_sample@t=981", "out_sample@t=981#2"}


def test_bounds_can_be_given_and_are_what_the_checks_say(dense, calls):
    bounds = Bounds(cosine=0.5, relative_l2=0.5)
    result = check_calls(calls[:1], of(dense), lambda call: 1.3 * predict(dense, call), "fp32", bounds=bounds)
    assert result["passed"] and [c["bound"] for c in result["checks"]] == [0, 0.5, 0.5]
    assert BOUNDS["fp32"].relative_l2 < BOUNDS["fp16"].relative_l2


def test_nothing_to_compare_is_an_error(dense, calls):
    with pytest.raises(InputError, match="at least one"):
        check_calls([], of(dense), of(dense), "fp32")
    with pytest.raises(InputError, match="int4"):
        check_calls(calls, of(dense), of(dense), "int4")  # type: ignore[arg-type]


def test_psnr_counts_from_the_full_range_also_for_dark_images():
    dark = np.full((8, 8, 3), 4, np.uint8)
    lighter = dark + 1
    assert image_psnr(dark, lighter) == pytest.approx(20 * np.log10(255), abs=1e-6)
    assert image_psnr(Image.fromarray(dark), Image.fromarray(dark)) == 100
    assert image_psnr(dark / 255, lighter / 255) == pytest.approx(image_psnr(dark, lighter))


def test_images_are_held_against_a_bound():
    image = np.zeros((8, 8, 3), np.uint8)
    rows = check_images([image, image], [image, image + 60])
    assert [row["passed"] for row in rows] == [True, False]
    assert rows[1]["tensor"] == "image#1" and rows[1]["metric"] == "psnr_db" and rows[1]["bound"] == 35.0
    with pytest.raises(InputError, match="different shape"):
        image_psnr(image, image[:4])

"""A UNet of another runtime in the place of a pipeline's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.runtimes.unet import UNet
from slimdiff.denoising.trajectory import Call, denoiser_name, predict, record_calls
from slimdiff.errors import InputError
from slimdiff.settings import Sampling

HERE = ["onnxruntime", "openvino-fp32"]


@pytest.fixture(scope="module", params=HERE)
def runtime(request):
    module = request.param.partition("-")[0]
    pytest.importorskip(module, reason=f"{module} is an extra")
    return request.param


@pytest.fixture(scope="module")
def unet(exported, runtime):
    return UNet.open(exported["dense"], runtime, threads=1)


def changed(call: Call, **arguments) -> Call:
    return Call(call.step, call.timestep, call.arguments | arguments)


def test_it_answers_as_torch_does(unet, dense, calls):
    for call in calls:
        torch.testing.assert_close(unet.predict(call), predict(dense, call), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predict(unet, call), unet.predict(call))


def test_folder_and_file_are_the_same(exported, unet, runtime, calls):
    assert torch.equal(UNet.open(exported["dense"].parent, runtime, 1).predict(calls[0]), unet.predict(calls[0]))


def test_fp16_graph_takes_and_gives_the_callers_dtype(exported, runtime, calls, dense):
    unet = UNet.open(exported["dense-fp16"], runtime)
    assert unet.dtype == torch.float16 and unet.session.precision == "fp16"
    noise = unet(**calls[0].arguments, return_dict=True).sample
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, predict(dense, calls[0]), rtol=0.05, atol=0.02)


def test_moving_and_casting_leave_the_session_as_it_is(unet):
    assert unet.to(torch.float16) is unet and unet.dtype == torch.float32 == next(unet.parameters()).dtype


def test_a_pipeline_makes_the_same_images_with_it(pipeline, exported, runtime):
    def images():
        torch.manual_seed(0)
        seeds = [torch.Generator().manual_seed(0)]
        return pipeline(
            ["abc"], num_inference_steps=3, guidance_scale=5.0, generator=seeds, output_type="np", height=16, width=16
        ).images

    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.unet
    expected = images()
    try:
        pipeline.unet = UNet.open(exported["dense-open"], runtime, threads=1)
        assert denoiser_name(pipeline) == "unet"
        found = images()
        sampling = Sampling(steps=2, guidance=5.0, batch=1, height=16, width=16)
        recorded = record_calls(pipeline, ["abc"], sampling)
    finally:
        pipeline.unet = own
    assert expected.shape == (1, 16, 16, 3) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [call.step for call in recorded] == [0, 1]


def test_open_batch_takes_any_batch_that_is_one(exported, runtime, tiny, dense):
    unet = UNet.open(exported["dense-open"], runtime)
    for batch in (1, 3, 2, 1):
        call = tiny.calls(batch)[0]
        torch.testing.assert_close(unet.predict(call), predict(dense, call), rtol=1e-4, atol=1e-5)
    mixed = changed(tiny.calls(3)[0], encoder_hidden_states=torch.zeros(2, 7, 32))
    with pytest.raises(InputError, match=r"takes sample \(batch, 4, 8, 8\)"):
        unet.predict(mixed)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"sample": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\).*takes sample \(2, 4, 8, 8\)"),
        ({"sample": torch.zeros(2, 4, 16, 16)}, r"takes sample \(2, 4, 8, 8\)"),
        ({"encoder_hidden_states": torch.zeros(2, 77, 32)}, "prompt has 77 tokens, and .* takes 7"),
        ({"encoder_hidden_states": torch.zeros(2, 32)}, r"encoder_hidden_states \(2, 7, 32\)"),
        (
            {"timestep": torch.tensor(946.4)},
            "takes whole timesteps, and the scheduler gave 946.4: export the model again",
        ),
        ({"timestep": torch.tensor([3, 4])}, r"one timestep for all samples, given were \[3, 4\]"),
        ({"class_labels": torch.zeros(2)}, "class_labels"),
        ({"added_cond_kwargs": {"time_ids": torch.zeros(2, 6)}}, "time_ids"),
    ],
)
def test_what_the_graph_does_not_take_is_refused(unet, calls, arguments, told):
    with pytest.raises(InputError, match=told):
        unet.predict(changed(calls[0], **arguments))


def test_whole_timesteps_of_any_kind_are_taken(unet, calls):
    expected = unet.predict(calls[0])
    for timestep in (981, 981.0, torch.tensor(981.0), torch.tensor([981, 981])):
        assert torch.equal(unet.predict(changed(calls[0], timestep=timestep)), expected)


def test_a_pipelines_default_size_is_the_graphs(exported, unet, dense):
    """A model of another default size, exported for this one: whoever asks for no size gets what there is."""
    assert UNet(unet.session, {"sample_size": 64}).config.sample_size == 8 == dense.config.sample_size


def test_a_graph_of_something_else_is_refused(unet):
    class Other:
        inputs, source = {"input_ids": (1, 7)}, "model.onnx"

    with pytest.raises(InputError, match="model.onnx is no UNet: its inputs are input_ids"):
        UNet(Other(), {})

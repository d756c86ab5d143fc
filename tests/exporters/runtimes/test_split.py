"""What the prompt and the time decide is computed once, and never taken for another call's."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript", reason="the ONNX export needs the extra onnx")
pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

from exporters.graphs.split import split_graph  # noqa: E402
from exporters.runtimes.split import HELD  # noqa: E402
from exporters.runtimes.unet import UNet  # noqa: E402
from slimdiff.denoising.trajectory import predict  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory, exported) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    split_graph(exported["dense-open"], folder)
    shutil.copy(exported["dense-open"].parent / "config.json", folder)
    return folder


class Counted:
    """A session that counts its runs."""

    def __init__(self, session, runs, part):
        self._session, self._runs, self._part = session, runs, part

    def __getattr__(self, name):
        return getattr(self._session, name)

    def run(self, feed):
        self._runs[self._part] += 1
        return self._session.run(feed)


@pytest.fixture
def unet_and_runs(folder):
    unet, runs = UNet.open(folder), Counter()
    unet.session.parts |= {part: Counted(session, runs, part) for part, session in unet.session.parts.items()}
    return unet, runs


def check(unet, dense, call) -> None:
    right = predict(dense, call)
    assert float((unet.predict(call) - right).norm() / right.norm()) < 1e-5


def test_a_prompt_is_computed_once_and_a_time_once(unet_and_runs, dense, calls):
    unet, runs = unet_and_runs
    prompt = calls[0].arguments["encoder_hidden_states"]
    for _image in range(2):
        for call in calls:
            # Another tensor with the same values, as pipelines make one in every step.
            check(unet, dense, replace(call, arguments=call.arguments | {"encoder_hidden_states": prompt.clone()}))
    assert runs == {"prompt": 1, "time": len(calls), "step": 2 * len(calls)}


def test_no_call_gets_the_keys_and_values_of_another(unet_and_runs, dense, tiny):
    """A tensor changed in place, another prompt, another batch, one sample of it, and the first again."""
    unet, runs = unet_and_runs
    call = tiny.calls()[0]
    first = copy.deepcopy(call)
    check(unet, dense, call)
    call.arguments["encoder_hidden_states"][1, 3, 5] += 1
    check(unet, dense, call)
    call.arguments["encoder_hidden_states"].copy_(torch.randn(2, 7, 32))
    check(unet, dense, call)
    for other in (tiny.calls(3)[0], tiny.calls(1)[0], first):
        check(unet, dense, other)
    swapped = first.arguments["encoder_hidden_states"].flip(0).contiguous()
    check(unet, dense, replace(first, arguments=first.arguments | {"encoder_hidden_states": swapped}))
    assert runs["prompt"] == 7 and runs["time"] == 3  # one a batch: the time was the same in all


def test_what_is_kept_is_not_what_callers_get(unet_and_runs, dense, calls):
    unet, _ = unet_and_runs
    noise = unet.predict(calls[0])
    noise.zero_()
    check(unet, dense, calls[0])
    twin = copy.deepcopy(unet)  # pipelines are copied; the session is shared
    check(twin, dense, calls[1])
    check(unet, dense, calls[0])


def test_answers_that_are_kept_are_few(unet_and_runs, calls):
    unet, runs = unet_and_runs
    session = unet.session
    feed = {name: value.numpy() for name, value in calls[0].arguments.items()}
    for time in range(HELD["time"] + 3):
        session.answer("time", feed | {"timestep": np.array(time)})
    for shift in range(HELD["prompt"] + 3):
        session.answer("prompt", feed | {"encoder_hidden_states": feed["encoder_hidden_states"] + np.float32(shift)})
    assert {part: len(held) for part, held in session._held.items()} == HELD
    session.answer("time", feed | {"timestep": np.array(0)})  # the oldest went
    assert runs["time"] == HELD["time"] + 4


def test_parts_run_in_openvino(folder, dense, tiny):
    pytest.importorskip("openvino", reason="OpenVINO is an extra")
    unet = UNet.open(folder, "openvino-fp32")
    for call in (*tiny.calls(), tiny.calls(1)[0]):
        check(unet, dense, call)

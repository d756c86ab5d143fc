"""A UNet's graph with a timestep per sample computes what the one with a scalar does."""

from __future__ import annotations

import shutil

import onnx
import onnx_ir as ir
import pytest
import torch

from exporters.graphs.reading import read_graph
from exporters.graphs.timesteps import timestep_per_sample
from exporters.runtimes.module import answer
from exporters.runtimes.ort_session import OnnxRuntimeSession
from slimdiff.errors import InputError


@pytest.mark.parametrize("name", ["dense", "dense-open"])
def test_every_sample_is_at_its_own_timestep(exported, calls, tmp_path, name):
    model = read_graph(exported[name])
    timestep_per_sample(model)
    ir.save(model, str(tmp_path / "model.onnx"))
    shutil.copy(exported[name].parent / "model.onnx.data", tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=False)
    scalar, changed = OnnxRuntimeSession(exported[name]), OnnxRuntimeSession(tmp_path / "model.onnx")
    assert changed.inputs["timestep"] == changed.inputs["sample"][:1]

    inputs = {k: v for k, v in calls[0].arguments.items() if k != "timestep"}
    early, late = (answer(scalar, {**inputs, "timestep": torch.tensor(t)})["out_sample"] for t in (21, 981))
    torch.testing.assert_close(answer(changed, {**inputs, "timestep": torch.tensor([981, 981])})["out_sample"], late)
    mixed = answer(changed, {**inputs, "timestep": torch.tensor([21, 981])})["out_sample"]
    torch.testing.assert_close(mixed, torch.stack([early[0], late[1]]))
    assert not torch.allclose(early[1], late[1], atol=1e-4)


def test_it_is_done_once(exported):
    model = read_graph(exported["dense-open"])
    timestep_per_sample(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    timestep_per_sample(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_graph_that_begins_otherwise_is_refused(exported):
    model = read_graph(exported["dense"])
    model.graph[0].op_type = "Flatten"
    with pytest.raises(InputError, match="does not begin by spreading its timestep"):
        timestep_per_sample(model)
    model.graph.inputs[0].name = "latent"
    with pytest.raises(InputError, match="no UNet: its inputs are latent, timestep"):
        timestep_per_sample(model)

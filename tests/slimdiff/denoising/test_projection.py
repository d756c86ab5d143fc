"""Changes measured together, by projections: what each does alone, to first order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from conftest import PROMPTS, SAMPLING
from torch import nn

from slimdiff.denoising import projection
from slimdiff.denoising.int8 import count_layer_macs, input_ranges, rounded
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.projection import Projection, project_changes
from slimdiff.denoising.replay import Change
from slimdiff.denoising.trajectory import Call, record_calls
from slimdiff.planning.changes import DRAWS, squared_changes


@pytest.fixture(scope="module")
def call(pipeline):
    return record_calls(pipeline, PROMPTS[:2], SAMPLING)[1]


@pytest.fixture(scope="module")
def changes(pipeline, call):
    """Every third layer in int8, one at a time."""
    some = list(count_layer_macs(pipeline.unet, call))[::3]
    ranges = input_ranges(pipeline.unet, some, [call])
    return {path: Change(path, partial(rounded, pipeline.unet, {path: ends})) for path, ends in ranges.items()}


def alone(denoiser, call, changes):
    return squared_changes(denoiser, call, changes, name="alone", large=False, number=0, expected=lambda _: None)


def test_many_projections_give_what_each_change_does_alone(pipeline, call, changes):
    exact, energy = alone(pipeline.unet, call, changes)
    found, output = project_changes(pipeline.unet, call, changes, 150)
    assert float(output.double().square().sum()) == energy
    ratios = np.array([found[name] / exact[name] for name in exact])
    assert len(ratios) > 10 and np.median(ratios) == pytest.approx(1, abs=0.1)
    assert ratios.min() > 0.6 and ratios.max() < 1.6


def test_few_projections_scatter_as_said(pipeline, call, changes):
    exact, _ = alone(pipeline.unet, call, changes)
    seconds = []
    rows = [project_changes(pipeline.unet, call, changes, DRAWS, number, seconds.append)[0] for number in range(4)]
    ratios = np.array([[row[name] / exact[name] for name in exact] for row in rows])
    assert 0.05 < ratios.std() < 0.5  # a fourth, of four samples that change alike
    assert len(seconds) == 4 and min(seconds) > 0
    assert rows[0] == project_changes(pipeline.unet, call, changes, DRAWS, 0)[0]


def test_the_denoiser_is_as_it_was(pipeline, call, changes, monkeypatch):
    unet = pipeline.unet
    wanting = [parameter.requires_grad for parameter in unet.parameters()]

    def is_left():
        assert [parameter.requires_grad for parameter in unet.parameters()] == wanting
        assert not unet.is_gradient_checkpointing and all(p.grad is None for p in unet.parameters())
        assert not any(module._forward_hooks for module in unet.modules())

    project_changes(unet, call, changes, 1)
    is_left()
    bad = {"conv_in": Change("conv_in", partial(exchanged, unet.conv_in, {"weight": torch.zeros(1)}))}
    with pytest.raises(RuntimeError):
        project_changes(unet, call, bad, 1)
    is_left()
    monkeypatch.setattr(Projection, "squared", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        project_changes(unet, call, changes, 1)
    is_left()


class Shared(nn.Module):
    """A layer that runs twice, one that mixes the samples, and one that no sample goes through."""

    def __init__(self):
        super().__init__()
        self.twice, self.mixing, self.aside, self.pair = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, sample, return_dict=False):
        once = self.twice(sample)
        aside = self.aside(torch.ones(1, 6))
        both = self.mixing(once.reshape(1, -1, 6).transpose(0, 1).reshape(6, -1).T)
        return (self.twice(both) + aside + self.pair(sample)[:, :1],)


def test_modules_that_run_twice_or_mix_samples_are_measured_whole():
    """The denoiser is linear, so that nothing is lost to first order."""
    torch.manual_seed(1)
    denoiser = Shared().eval()
    call = Call(0, 1, {"sample": torch.randn(3, 6)})
    weights = {name: 0.1 * torch.randn(6) for name in ("mixing", "aside", "pair")}
    changes = {
        name: Change(name, partial(exchanged, denoiser.get_submodule(name), {"bias": bias}))
        for name, bias in weights.items()
    }
    exact, _ = alone(denoiser, call, changes)
    found, _ = project_changes(denoiser, call, changes, 2000)
    assert found == pytest.approx(exact, rel=0.15)
    own = denoiser.twice.bias.detach().clone()
    twice = {"twice": Change("twice", partial(exchanged, denoiser.twice, {"bias": own + 0.01}))}
    assert project_changes(denoiser, call, twice, 2000)[0] == pytest.approx(alone(denoiser, call, twice)[0], rel=0.15)


def test_projections_are_drawn_from_no_pictures_seed(pipeline, call):
    """An output looks like the noise of its picture: drawn with the same seed, v would point at it."""
    sample = call.arguments["sample"]
    drawn = torch.randn(sample.shape, generator=torch.Generator().manual_seed(projection.SEED))
    assert abs(float(nn.functional.cosine_similarity(drawn.flatten(), sample.float().flatten(), dim=0))) < 0.15


class Cut(nn.Module):
    """A layer whose output goes on without gradients, and one behind it."""

    def __init__(self):
        super().__init__()
        self.hidden, self.shown = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, sample, return_dict=False):
        return (self.shown(self.hidden(sample).detach()),)


def test_a_change_that_no_gradient_comes_from_is_measured_alone():
    torch.manual_seed(1)
    denoiser, call = Cut().eval(), Call(0, 1, {"sample": torch.randn(3, 6)})
    changes = {
        name: Change(name, partial(exchanged, denoiser.get_submodule(name), {"bias": torch.ones(6)}))
        for name in ("hidden", "shown")
    }
    exact, _ = alone(denoiser, call, changes)
    for some in (changes, {"hidden": changes["hidden"]}):
        assert project_changes(denoiser, call, some, 2)[0]["hidden"] == exact["hidden"] > 0
    assert project_changes(denoiser, call, {}, 2)[0] == {}


@pytest.mark.parametrize("state", [torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_the_callers_torch_state_changes_nothing(pipeline, call, changes, state):
    own = project_changes(pipeline.unet, call, changes, 1)[0]
    with state():
        assert project_changes(pipeline.unet, call, changes, 1)[0] == own

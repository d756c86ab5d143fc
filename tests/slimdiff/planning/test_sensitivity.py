"""Sensitivities: what one site changes, measured on as many calls as plans need."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PROMPTS, SAMPLING

from slimdiff import PlanSettings
from slimdiff.denoising.modules import exchanged
from slimdiff.denoising.replay import Replay
from slimdiff.denoising.samples import one_branch, some_of
from slimdiff.denoising.trajectory import Call, predict, record_calls
from slimdiff.groups import GROUPS, find_sites
from slimdiff.groups.group import Evidence
from slimdiff.planning import changes, sensitivity
from slimdiff.planning.changes import affordable
from slimdiff.planning.planner import Planner
from slimdiff.planning.sensitivity import PORTION, in_turn, measure_sensitivities
from slimdiff.slimming.slim import factorise


@pytest.fixture(scope="module")
def statistics(compression):
    return compression.statistics


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS[:2], SAMPLING)


@pytest.fixture(scope="module")
def sites(pipeline):
    return find_sites(pipeline.unet)[0][:3]


def test_it_is_the_change_of_the_output_at_half_rank(pipeline, statistics, calls, sites):
    """Computed whole here: nothing of the dense model is remembered."""
    factors = factorise(pipeline.unet, statistics, sites)
    result = measure_sensitivities(pipeline.unet, statistics, sites, factors, calls[:3])
    for site in sites:
        rank = site.dense_rank // 2
        module = pipeline.unet.get_submodule(site.path)
        weights = GROUPS[site.group].emulate(Evidence(module, site, statistics), rank, factors[site.name])
        changed = energy = 0.0
        for call in calls[:3]:
            dense = predict(pipeline.unet, call).double()
            with exchanged(module, weights):
                changed += float((predict(pipeline.unet, call) - dense).square().sum())
            energy += float(dense.square().sum())
        assert result[site.name] == pytest.approx(changed / energy / float(factors[site.name].tail[rank]), rel=1e-4)


def test_no_more_calls_are_taken_than_plans_need(pipeline, statistics, calls, sites, monkeypatch):
    factors = factorise(pipeline.unet, statistics, sites)
    taken = []

    class Counted(Replay):
        def __init__(self, denoiser, call, paths):
            taken.append(call)
            super().__init__(denoiser, call, paths)

    monkeypatch.setattr(changes, "Replay", Counted)
    many = [calls[i % len(calls)] for i in range(6)]

    def measure(regret):
        taken.clear()
        return measure_sensitivities(pipeline.unet, statistics, sites, factors, many, regret=regret), list(taken)

    every, seen = measure(None)
    assert seen == in_turn(many)
    assert measure(lambda *_: 1.0) == (every, seen)
    asked = []
    few, seen = measure(lambda known, better: asked.append((known, better)) or 0.0)
    assert seen == in_turn(many)[: 2 * PORTION] and asked[0][1] == few
    assert asked[0][0] == measure_sensitivities(pipeline.unet, statistics, sites, factors, seen[:PORTION])


def test_of_a_large_model_a_pass_has_one_sample_of_each_branch_in_turn(pipeline, statistics, calls, sites, monkeypatch):
    factors = factorise(pipeline.unet, statistics, sites)
    samples = [call.arguments["sample"] for call in calls]
    assert all(len(sample) == 4 for sample in samples)
    assert all(map(torch.equal, samples, (call.arguments["sample"] for call in affordable(pipeline.unet, calls))))
    whole = measure_sensitivities(pipeline.unet, statistics, sites, factors, calls)
    monkeypatch.setattr(changes, "MOST_MACS", 1.0)
    few = affordable(pipeline.unet, calls[:4])
    texts = [call.arguments["encoder_hidden_states"] for call in few]
    rows = [
        next(i for i, row in enumerate(full.arguments["encoder_hidden_states"]) if torch.equal(row, text[0]))
        for full, text in zip(calls, texts, strict=False)
    ]  # of a prompt's calls, the empty text is the same
    assert all(len(text) == 1 for text in texts)
    assert {row < 2 for row in rows} == {True, False}
    taken = affordable(pipeline.unet, in_turn(calls))
    part = measure_sensitivities(pipeline.unet, statistics, sites, factors, calls)
    monkeypatch.setattr(sensitivity, "in_turn", list)
    assert part == measure_sensitivities(pipeline.unet, statistics, sites, factors, taken) != whole


def test_calls_of_other_batches_are_thinned_too(pipeline, calls, monkeypatch):
    """A pipeline that guides a part of the steps calls with one sample, and with two."""
    monkeypatch.setattr(changes, "MOST_MACS", 1.0)
    one = some_of(calls[0], torch.tensor([1]))
    few = affordable(pipeline.unet, [one, calls[1]])
    assert few[0] is one and len(few[1].arguments["sample"]) == 1


def test_a_call_whose_samples_cannot_be_told_apart_is_taken_whole(pipeline, calls, monkeypatch):
    monkeypatch.setattr(changes, "MOST_MACS", 1.0)
    shared = replace(calls[0], arguments=calls[0].arguments | {"ids": torch.zeros(7, 3)})
    assert affordable(pipeline.unet, [shared]) == [shared]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6, 10, 16])
def test_one_sample_a_call_is_of_every_branch_in_turn(batch):
    seen = [int(one_branch(batch, 1, number)) for number in range(batch)]
    assert len(set(seen)) >= min(batch, 3)
    if batch % 2 == 0:
        assert {sample < batch // 2 for sample in seen[:3]} == {True, False}


def test_every_beginning_of_the_calls_is_spread_over_all_of_them():
    calls = list(range(16))
    ordered = in_turn(calls)
    assert sorted(ordered) == calls
    for count in (2, 4, 8):
        gaps = np.diff([0, *sorted(ordered[:count]), 16])
        assert gaps.max() <= 2.7 * 16 / count


def test_a_plan_by_other_sensitivities_is_regretted(pipeline, statistics, calls):
    planner = Planner(pipeline.unet, statistics, PlanSettings(align=4), calls=calls)
    known = {site.name: 1.0 for site in planner.chosen}
    assert planner._regret(known, known) == 0
    other = {name: 10.0 ** (number % 5) for number, name in enumerate(known)}
    assert planner._regret(known, other) > sensitivity.STABLE > planner._regret(other, other)


def test_a_stage_that_runs_twice_or_is_changed_afterwards_runs_again():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))

        def forward(self, sample, return_dict=False):
            steady = self.layers[0](sample)
            changed = self.layers[1](steady)
            changed.add_(1)
            return (self.layers[3](self.layers[2](self.layers[2](steady + changed))),)

    torch.manual_seed(0)

    class Remembering(Twice):
        """Which takes what a module left, and not what it gave."""

        def forward(self, sample, return_dict=False):
            self.layers[0](sample)
            return (self.layers[3](self.seen.pop()),)

    hidden = Remembering().eval()
    hidden.seen = []
    hidden.layers[0].register_forward_pre_hook(lambda _layer, args: hidden.seen.append(args[0] * len(hidden.calls)))
    hidden.calls = [1]
    keep = hidden.layers[0].register_forward_hook(lambda *_: hidden.calls.append(1))
    replay = Replay(hidden, Call(0, 1, {"sample": torch.randn(2, 4)}), ["layers.3"])
    assert replay.before("layers.3") == {}
    keep.remove()
    denoiser = Twice().eval()
    replay = Replay(denoiser, Call(0, 1, {"sample": torch.randn(2, 4)}), ["layers.3"])
    assert list(replay.before("layers.3")) == ["layers.0"]
    assert torch.equal(replay.predict("layers.3"), replay.output)
    before = copy.deepcopy(denoiser.state_dict())
    with exchanged(denoiser.layers[3], {"weight": torch.zeros(4, 4)}):
        assert torch.equal(replay.predict("layers.3"), predict(denoiser, replay.call))
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    assert all("forward" not in vars(layer) for layer in denoiser.layers)

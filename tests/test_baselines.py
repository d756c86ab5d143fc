"""The methods that slimming is compared with are what they say, so that the comparison is fair."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import PROMPTS, SAMPLING
from torch import nn

from benchmarks.baselines import (
    _group_magnitude,
    _truncate,
    magnitude_pruning,
    plain_svd,
    random_channels,
    torch_pruning,
)
from slimdiff import Budget, PlanSettings, make_plan, slim_denoiser
from slimdiff.denoising.trajectory import predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import find_sites
from slimdiff.planning.costs import count_parameters


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS, SAMPLING)


@pytest.mark.parametrize("method", [magnitude_pruning, plain_svd, random_channels, torch_pruning])
def test_a_baseline_has_the_plans_size_and_is_worse(pipeline, compression, calls, method):
    if method is torch_pruning:
        pytest.importorskip("torch_pruning", reason="Torch-Pruning needs the extra dev")
    statistics = compression.statistics
    settings = PlanSettings(allocation="uniform", align=4)
    plan = make_plan(pipeline.unet, statistics, Budget("20%"), settings)
    other = method(pipeline.unet, plan)
    ours = slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls)
    assert count_parameters(other) == count_parameters(ours) == plan.parameters["slim"]

    def error(slim):
        return noise_error(lambda c: predict(pipeline.unet, c), lambda c: predict(slim, c), calls)["relative_mse"]

    assert error(ours) < error(other)


@pytest.mark.parametrize("group", ["value_output", "feed_forward", "resnet"])
def test_torch_pruning_groups_all_that_shares_the_inner_dimension(pipeline, group):
    """Its score of a dimension is that of all its weights: zero where they all are, and nowhere else."""
    pytest.importorskip("torch_pruning", reason="Torch-Pruning needs the extra dev")
    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == group)
    module = copy.deepcopy(pipeline.unet.get_submodule(site.path))
    for linear in module.modules():
        if isinstance(linear, nn.Linear | nn.Conv2d | nn.GroupNorm):
            for axis in (0, 1):
                if linear.weight.ndim > axis and linear.weight.shape[axis] == site.heads * site.dense_rank:
                    linear.weight.data.select(axis, 3).zero_()
                if linear.weight.shape[0] == 2 * site.dense_rank and axis == 0:
                    linear.weight.data[[3, 3 + site.dense_rank]] = 0
    score = _group_magnitude(module, site)
    assert float(score[3]) == 0 and len(score) == site.heads * site.dense_rank
    assert bool((score[torch.arange(len(score)) != 3] > 0).all())


def test_svd_at_full_rank_of_the_product_is_exact(pipeline, compression, calls):
    """Truncating nothing changes nothing: the factors' layout and scale are right."""
    site = next(s for s in find_sites(pipeline.unet)[0] if s.group == "query_key")
    module = pipeline.unet.get_submodule(site.path)
    left, right = (w.weight.reshape(site.heads, site.dense_rank, -1) for w in (module.to_q, module.to_k))
    first, second = _truncate(left.mT @ right, site.dense_rank)
    torch.testing.assert_close((first @ second).float(), left.mT @ right, atol=1e-6, rtol=1e-4)

"""A kind of group from outside the package is slimmed from calibration to the exported graph, by its own file alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import PROMPTS, SAMPLING, tiny_unet
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import TimestepEmbedding
from families.family import TWO_LEVELS, noise
from torch import Tensor, nn

from slimdiff import (
    Budget,
    CalibrationSettings,
    InputError,
    Plan,
    PlanSettings,
    SlimdiffError,
    calibrate,
    make_plan,
    slim_denoiser,
)
from slimdiff.algebra.elimination import ChannelOrder, elimination_order, solve_down
from slimdiff.compression import with_denoiser
from slimdiff.denoising.trajectory import Call, predict, record_calls
from slimdiff.fidelity import noise_error
from slimdiff.groups import GROUPS, find_sites, register
from slimdiff.groups.group import Evidence, Group, Inner, Site, solved, wide
from slimdiff.models import plan_of
from slimdiff.planning.costs import count_macs, count_parameters
from slimdiff.planning.planner import Planner
from slimdiff.slimming.skeleton import skeleton

STEPS = SAMPLING.model_copy(update={"steps": 16})
PLANNING = PlanSettings(align=8, groups=("time_mlp",), sensitivity_calls=2)
PATH = "time_embedding"
NAME = "time_embedding.time_mlp"


class TimeMlp(Group[ChannelOrder]):
    """Channels between the two linears of a UNet's time embedding."""

    name = "time_mlp"
    inner = {"linear_1": Inner(0), "linear_2": Inner(1)}

    def site(self, path: str, module: nn.Module) -> Site | str | None:
        if not isinstance(module, TimestepEmbedding):
            return None
        if module.cond_proj is not None:
            return "a second input is projected"
        return self.at(path, module, module.linear_1.out_features)

    def factor(self, evidence: Evidence) -> ChannelOrder:
        return elimination_order(evidence.moment(), wide(evidence.module.linear_2.weight))

    def slim(self, evidence: Evidence, rank: int, factor: ChannelOrder) -> dict[str, Tensor]:
        kept, last = factor.order[:rank].sort().values, evidence.module.linear_2
        moment, mean = evidence.received(last)
        weight = solve_down(moment, wide(last.weight), kept)
        weights = self.cut(evidence.module, evidence.site, kept)
        return weights | solved("linear_2", last, weight, mean, lambda mean: mean[kept])


@pytest.fixture(scope="module", autouse=True)
def toy():
    register(TimeMlp())
    yield
    del GROUPS[TimeMlp.name]


@pytest.fixture(scope="module")
def statistics(pipeline):
    """Of as many times as the embedding needs to show its dimensions."""
    return calibrate(pipeline, PROMPTS[:2], CalibrationSettings(sampling=STEPS))


@pytest.fixture(scope="module")
def calls(pipeline):
    return record_calls(pipeline, PROMPTS[:2], STEPS, every=4)


@pytest.fixture(scope="module")
def plan(pipeline, statistics, calls) -> Plan:
    """Most of what the group can give."""
    return make_plan(pipeline.unet, statistics, Budget("1%"), PLANNING, calls=calls)


@pytest.fixture(scope="module")
def slim(pipeline, statistics, plan, calls):
    return slim_denoiser(pipeline.unet, statistics, plan, fitting_calls=calls)


def at_rank(plan: Plan, rank: int) -> Plan:
    plan = plan.model_copy(deep=True)
    plan.sites[NAME].rank = rank
    return plan.recount()


def error(dense: nn.Module, slim: nn.Module, calls) -> float:
    return noise_error(lambda c: predict(dense, c), lambda c: predict(slim, c), calls)["relative_mse"]


def test_it_is_found_and_calibrated_beside_the_others(pipeline, statistics):
    sites, _ = find_sites(pipeline.unet)
    assert Counter(s.group for s in sites) == Counter(
        query_key=14, value_output=14, feed_forward=7, resnet=11, time_mlp=1
    )
    site = next(s for s in sites if s.group == "time_mlp")
    assert (site.path, site.dense_rank, site.cost) == (PATH, 128, 32 + 1 + 128)
    assert GROUPS["time_mlp"].covers(site, statistics) and statistics.mean(NAME).shape == (128, 128)
    assert statistics.tokens[NAME] == 2 * STEPS.steps * 2  # both branches of guidance, one time each


def test_the_plan_counts_what_the_slim_model_costs(pipeline, plan, slim, calls):
    assert plan.sites[NAME].rank < 128 and all(s.rank == s.dense_rank for n, s in plan.sites.items() if n != NAME)
    assert plan.parameters["slim"] == count_parameters(slim) < count_parameters(pipeline.unet)
    batch = calls[0].arguments["sample"].shape[0]
    assert plan.costs["macs"]["dense"] == count_macs(pipeline.unet, calls[0]) / batch
    assert plan.costs["macs"]["slim"] == pytest.approx(count_macs(slim, calls[0]) / batch, rel=1e-12)


def test_its_sensitivity_is_measured_and_kept(pipeline, statistics, plan, calls):
    planner = Planner(pipeline.unet, statistics, PLANNING, calls=calls[:2])
    assert planner.sensitivities[NAME] > 0 and plan.sites[NAME].sensitivity


def test_full_rank_is_the_dense_model_and_error_falls_as_rank_rises(pipeline, statistics, plan, calls):
    def slimmed(rank: int) -> nn.Module:
        return slim_denoiser(pipeline.unet, statistics, at_rank(plan, rank), fitting_calls=calls)

    assert error(pipeline.unet, slimmed(128), calls) == 0
    errors = [error(pipeline.unet, slimmed(rank), calls) for rank in (2, 8, 32, 96)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_it_saves_and_loads_with_the_plans_size(pipeline, plan, slim, calls, tmp_path):
    with_denoiser(pipeline, slim).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path).unet
    assert type(loaded).__name__ == "SlimUNet2DConditionModel" and loaded.time_embedding.linear_1.out_features < 128
    assert count_parameters(loaded) == plan.parameters["slim"]
    torch.testing.assert_close(predict(loaded, calls[0]), predict(slim, calls[0]))


def test_the_graph_has_the_plans_dims_and_a_dense_one_is_refused(tmp_path):
    pytest.importorskip("onnxscript")
    from exporters.graphs.export import export_unet
    from exporters.graphs.naming import check_reduced_dims
    from exporters.graphs.shapes import check_leftovers

    dense = tiny_unet(**TWO_LEVELS)
    slim, times = skeleton(dense, {PATH: 40}), torch.tensor(5)
    arguments = {"sample": noise(1, 4, 8, 8), "timestep": times, "encoder_hidden_states": noise(1, 7, 32)}
    call, plan = Call(0, 5, arguments), plan_of(slim)
    rows = check_reduced_dims(export_unet(slim, tmp_path / "slim", call), plan)
    row = next(row for row in rows if row["site"] == NAME)
    assert row["ok"] and row["expected"] == row["found"] == {"linear_1": 40, "linear_2": 40}
    graph = export_unet(dense, tmp_path / "dense", call)
    assert [row["site"] for row in check_reduced_dims(graph, plan) if not row["ok"]] == [NAME]
    with pytest.raises(SlimdiffError, match=f"dense dimensions are left .* the first at {PATH}"):
        check_leftovers(graph, plan)


def test_without_it_its_plans_and_names_are_refused(pipeline, statistics, plan):
    toy = GROUPS.pop("time_mlp")
    try:
        with pytest.raises(InputError, match=r"plan.json: sites.*group.*there is no group 'time_mlp'"):
            Plan.parse(plan.model_dump(mode="json"), "plan.json")
        with pytest.raises(InputError, match="groups: there is no group 'time_mlp'"):
            make_plan(pipeline.unet, statistics, Budget("1%"), PLANNING)
    finally:
        register(toy)
    with pytest.raises(ValueError, match="already"):
        register(toy)

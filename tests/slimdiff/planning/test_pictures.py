"""What a picture costs by ranks: as often, and at the batch, that its schedule runs each layer."""

from __future__ import annotations

import pytest
from conftest import PROMPTS, SAMPLING

from slimdiff import Budget, InputError, PlanSettings, compress
from slimdiff.compression import Compressor
from slimdiff.denoising.trajectory import record_calls
from slimdiff.groups import find_sites
from slimdiff.planning.costs import CostTable, batch_of, count_macs, left_out_of_shallow, mac_costs, shallow_share
from slimdiff.planning.knapsack import find_layers
from slimdiff.planning.pictures import Picture, StepCosts
from slimdiff.planning.planner import chosen_sites
from slimdiff.schedule import Schedule, make_schedule
from slimdiff.slimming.skeleton import skeleton

PLANNING = PlanSettings(align=4, sensitivity_calls=2)
SCHEDULE = make_schedule(3, 12, guidance_interval=(0.0, 0.5), deep_every=3, depth="up_blocks.1")


@pytest.fixture(scope="module")
def one_call(pipeline):
    return record_calls(pipeline, PROMPTS[:1], SAMPLING.model_copy(update={"batch": 1}))[0]


def counted(unet, schedule: Schedule, call) -> float:
    """Multiply-adds of the calls of a picture, one after the other."""
    sample = count_macs(unet, call) / batch_of(call)
    share = shallow_share(unet, schedule.depth, call)
    return sum((2 if guided else 1) * sample * (1 if whole else share) for guided, whole in schedule.kinds())


def test_the_table_of_a_picture_is_what_its_calls_cost(pipeline, one_call):
    sites = chosen_sites(find_sites(pipeline.unet)[0], PLANNING)
    table = mac_costs(pipeline.unet, sites, one_call)
    picture = Picture(SCHEDULE, 2).macs(pipeline.unet, table, one_call)
    assert picture.dense == pytest.approx(counted(pipeline.unet, SCHEDULE, one_call))
    for share in (0.25, 0.5, 1):
        ranks = {layer.path: max(4, int(layer.dense_rank * share) // 4 * 4) for layer in find_layers(sites, 4)}
        slim = skeleton(pipeline.unet, ranks).eval()
        assert picture.of(ranks) == pytest.approx(counted(slim, SCHEDULE, one_call), rel=1e-6)


def test_a_deep_layer_counts_less_than_an_outer_one(pipeline, one_call):
    left_out = left_out_of_shallow(pipeline.unet, "up_blocks.1")
    sample = CostTable("macs", 100.0, {"up_blocks.2.a": {0: 0.0, 8: 1.0}, "mid_block.a": {0: 0.0, 8: 1.0}})
    assert "mid_block" in left_out and "up_blocks.2" not in left_out
    picture = Picture(SCHEDULE, 2).macs(pipeline.unet, sample, one_call)
    # Of 12 steps 6 are guided, and every third is whole.
    assert picture.savings("up_blocks.2.a", [0])[0] == 6 * 2 + 6 * 1
    assert picture.savings("mid_block.a", [0])[0] == 2 * 2 + 2 * 1


def test_a_plan_that_knows_the_schedule_errs_less_at_the_same_cost_of_a_picture(pipeline, calibration, one_call):
    """By the errors that it predicts: the knapsack is exact, so a plan for another cost can be no better."""
    work = [Compressor(pipeline, PROMPTS, calibration, PLANNING, schedule=s) for s in (None, SCHEDULE)]
    unaware, aware = work
    aware.statistics = unaware.statistics
    blind = unaware.plan(Budget(macs="14%"))
    unaware.planner.remember(aware.statistics)
    table = aware.planner.costs.work
    assert table is not None
    kept = table.of({path: rank for path, rank in blind.ranks().items() if path in table.layers})
    seeing = aware.plan(Budget(macs=str(int(table.dense - kept))))
    errors = [sum(site.predicted_error or 0.0 for site in plan.sites.values()) for plan in (blind, seeing)]
    assert errors[1] < errors[0]
    cost = seeing.costs["macs_per_image"]
    assert cost["slim"] <= cost["budget"] * (1 + 1e-9) and cost["slim"] <= kept * 1.0001
    assert "macs_per_image" not in blind.costs and blind.costs["macs"]["dense"] == seeing.costs["macs"]["dense"]


def test_what_does_not_fit_is_refused(pipeline, calibration):
    other = make_schedule(4, 6, deep_every=2)
    with pytest.raises(InputError, match="for a UNet of 4 levels, and this one has 3"):
        compress(pipeline, PROMPTS, Budget(macs="14%"), calibration=calibration, schedule=other)
    of_a_call = CostTable("latency_ms", 1.0, {})
    with pytest.raises(InputError, match="of a call, and the budget is of a whole picture"):
        compress(pipeline, PROMPTS, Budget(speedup=1.1), calibration=calibration, schedule=SCHEDULE, latency=of_a_call)


def test_costs_of_steps_add_up():
    costs = StepCosts.of_macs(0.25, 2)
    assert costs.of(SCHEDULE) / costs.full(12) == pytest.approx(SCHEDULE.cost(0.25, 2))
    measured = StepCosts({(True, True): 10.0, (True, False): 6.0, (False, True): 5.0, (False, False): 3.0}, 20.0)
    assert measured.of(SCHEDULE) == 20 + 2 * 10 + 4 * 6 + 2 * 5 + 4 * 3 and measured.full(12) == 140

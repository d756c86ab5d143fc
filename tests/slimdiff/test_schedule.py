"""The schedule's file: what it refuses, and how it is carried over to other numbers of steps."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimdiff.errors import InputError
from slimdiff.schedule import Schedule, make_schedule

HALF = {"levels": 3, "steps": 6, "depth": "up_blocks.2", "guided": [0, 1, 2], "whole": [0, 2, 4]}


@st.composite
def schedules(draw) -> Schedule:
    steps, seed = draw(st.integers(1, 40)), draw(st.integers(0, 1000))
    chance = random.Random(seed)
    whole = sorted({0} | {step for step in range(steps) if chance.random() < 0.5})
    guided = {step for step in range(steps) if chance.random() < 0.6}
    for step in sorted(guided - set(whole)):
        if max(w for w in whole if w < step) not in guided:
            guided.discard(step)
    return Schedule(levels=3, steps=steps, depth="up_blocks.1", guided=sorted(guided), whole=whole)


@given(schedules(), st.integers(1, 120))
def test_a_schedule_carried_over_is_one_and_says_so(schedule, steps):
    other = schedule.at(steps)
    Schedule.parse(other.model_dump(), "carried over")  # which holds it against every rule
    assert other.steps == steps
    assert other.carried_from == (None if steps == schedule.steps else schedule.steps)
    if steps % schedule.steps == 0:  # the old steps begin where new ones do
        times = steps // schedule.steps
        assert {step * times for step in schedule.whole} <= set(other.whole)
        assert [step // times for step in other.guided] == [s for s in schedule.guided for _ in range(times)]


@given(st.integers(1, 60), st.integers(1, 120))
def test_the_full_schedule_stays_full(steps, others):
    full = make_schedule(3, steps)
    assert full.is_full() and full.at(others).is_full() and full.cost(0.4) == 1


@pytest.mark.parametrize("measured", [True, False])
def test_carrying_over_claims_a_measurement_only_where_there_was_one(measured):
    own = Schedule.parse({**HALF, "made_by": {"latent_error": 0.01} if measured else {"deep_every": 2}}, "a schedule")
    said = own.how_carried(12)
    assert said.startswith("is for 6 calls of the UNet: it is carried over to 12 by trajectory fraction")
    assert said.endswith(", and what was measured holds for 6" if measured else "by trajectory fraction")


def test_a_schedule_said_by_hand():
    schedule = make_schedule(3, 10, guidance_interval=(0.2, 0.6), deep_every=3)
    assert schedule.guided == [2, 3, 4, 5] and schedule.depth == "up_blocks.2"
    # Guidance sets in at step 2, which so cannot reuse step 0.
    assert schedule.whole == [0, 2, 3, 6, 9]
    # 4 guided steps run two branches; 5 of 10 steps are whole, three of which are unguided.
    assert schedule.cost(0.5) == pytest.approx((2 * (2 + 2 * 0.5) + 3 + 3 * 0.5) / 20)
    assert schedule.cost(0.5, branches=1) == pytest.approx((5 + 5 * 0.5) / 10)


def test_it_is_read_as_it_was_written_a_line_a_field(tmp_path):
    schedule = make_schedule(4, 20, guidance_interval=(0, 0.5), deep_every=3)
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path) == Schedule.load(tmp_path / "schedule.json") == schedule
    assert ' "guided": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],' in (tmp_path / "schedule.json").read_text().splitlines()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guided": [0, 6]}, "guided has step 6, and the steps are 0 to 5"),
        ({"whole": [-1, 0]}, "whole has step -1"),
        ({"whole": [2, 4]}, "whole must have step 0: there is nothing to reuse before it"),
        ({"whole": [0, 0, 2]}, "whole must name each step once"),
        ({"guided": [2, 3], "whole": [0, 4]}, "step 2 is guided and reuses step 0, which is not"),
        ({"depth": None}, "step 1 is not in whole: say at which depth it reuses"),
        ({"depth": "up_blocks.3"}, "depth is up_blocks.3, and a UNet of 3 levels has up_blocks.1 or up_blocks.2"),
        ({"levels": 1, "depth": "up_blocks.1"}, "a UNet of 1 level has no depth to reuse"),
        ({"depth": "mid_block"}, "depth: "),
        ({"steps": 0}, "steps: "),
        ({"schema_version": 2}, "schema_version: "),
        ({"schema_version": True}, "schema_version: input should be 1"),
        ({"depth": "up_blocks.0"}, "depth: must be an up block but the first, such as up_blocks.2"),
        ({"steps": "6"}, "steps: Input should be a valid integer"),
        ({"steps": 6.0}, "steps: Input should be a valid integer"),
        ({"levels": True}, "levels: Input should be a valid integer"),
        ({"guided": [False, True]}, "guided.0: Input should be a valid integer"),
        ({"often": 3}, "often: "),
        ({"guided": "all"}, "guided: "),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(change, said, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({**HALF, **change}))
    with pytest.raises(InputError) as error:
        Schedule.load(file)
    assert f"{file}: " in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_of_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="no schedule can be read there"):
        Schedule.load(tmp_path)
    (tmp_path / "schedule.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Schedule.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"steps": 6, "steps": 4}', "the key 'steps' is there twice"),
        ('{"made_by": {"cost": 1, "cost": 2}}', "the key 'cost' is there twice"),
        ('{"made_by": {"latent_error": NaN}}', "NaN is no number of JSON"),
    ],
)
def test_what_json_leaves_open_is_refused(text, said, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(HALF)[:-1] + "," + text[1:])
    with pytest.raises(InputError) as error:
        Schedule.load(file)
    assert str(error.value) == f"{file} is not JSON: {said}"


@pytest.mark.parametrize("wrong", [(0.5, 0.5), (-0.1, 1), (0, 1.5), (0.8, 0.2)])
def test_an_interval_that_is_none_is_refused(wrong):
    with pytest.raises(InputError, match="an interval of guidance is like 0.0:0.5"):
        make_schedule(3, 10, guidance_interval=wrong)


def test_a_unet_of_one_level_has_no_depth():
    with pytest.raises(InputError, match="one level has no depth"):
        make_schedule(1, 10, deep_every=2)
    assert make_schedule(1, 10, guidance_interval=(0, 0.5)).depth is None

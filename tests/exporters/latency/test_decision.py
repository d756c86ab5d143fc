"""Whether the sequential test keeps its promises, on simulated machines whose process pairs scatter."""

from __future__ import annotations

from functools import partial
from itertools import count
from math import exp, log

import numpy as np
import pytest

from exporters.latency.decision import ERROR, LOOKS, Gate, interval
from exporters.latency.measure import hints, sample, summary
from exporters.latency.pair import PairTimes, SideTimes
from exporters.settings import BenchSettings
from slimdiff.errors import InputError

GATE = Gate.parse("latency<=1.05")
FOREVER = BenchSettings(max_seconds=1e8)


def pair(log_ratio: float, cpu_log_ratio: float | None = None, preempted: int = 0) -> PairTimes:
    sides = [SideTimes("simulated", {}, 1.0, 2.0, None, [t, 2 * t], preempted) for t in (10.0, 10 * exp(log_ratio))]
    return PairTimes((sides[0], sides[1]), log_ratio, log_ratio if cpu_log_ratio is None else cpu_log_ratio, None)


def machine(seed: int, slowdown: float, scatter: float, outliers: float = 0.0):
    """Pairs whose log ratios scatter about the truth; a share of them is disturbed, five times as far off."""
    generator = np.random.default_rng(seed)

    def turn(first: int) -> PairTimes:
        scale = scatter * (5 if generator.random() < outliers else 1)
        return pair(log(1 + slowdown) + scale * generator.standard_normal())

    return turn


def verdicts(runs: int, *truth: float, settings: BenchSettings = FOREVER) -> list[str]:
    ended = [sample(machine(seed, *truth), settings, GATE, lambda: 0.0) for seed in range(runs)]
    assert all(len(pairs) in {look.pairs for look in LOOKS} for pairs, _ in ended)
    return [judged.verdict for _, judged in ended]


def test_the_looks_share_the_error():
    assert sum(look.error for look in LOOKS) == pytest.approx(ERROR)
    assert [look.pairs for look in LOOKS] == sorted({look.pairs for look in LOOKS})


def test_pairs_fixed_beforehand_are_looked_at_once():
    pairs, judged = sample(machine(0, 0.0, 0.01), FOREVER.model_copy(update={"processes": 7}), GATE, lambda: 0.0)
    assert (len(pairs), judged.error) == (7, ERROR)


def test_the_interval_is_students():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(0).normal(0.03, 0.02, 9)
    found = interval(values, 0.01)
    expected = ttest_1samp(values, 0).confidence_interval(0.99)
    assert (1 / found.high, 1 / found.low) == pytest.approx((exp(expected.low), exp(expected.high)))
    assert found.low <= found.median <= found.high


def test_exchanged_sides_give_the_inverse():
    values = [0.01, 0.05, 0.02, 0.04, -0.01, 0.03]
    one, other = interval(values, 0.05), interval([-v for v in values], 0.05)
    assert (one.low, one.median, one.high) == pytest.approx((1 / other.high, 1 / other.median, 1 / other.low))


@pytest.mark.parametrize("scatter", [0.01, 0.03])
@pytest.mark.parametrize("bound", [-0.001, 0.001])
def test_at_the_bound_either_verdict_is_rare(scatter, bound):
    """At the bound itself, each verdict comes in 2.5 % at most, however often it is looked at."""
    told = verdicts(400, 0.05 + bound / 100, scatter)
    assert told.count("fail") <= 20 and told.count("pass") <= 20


@pytest.mark.parametrize("truth", [(0.0, 0.02), (0.0, 0.05), (0.0, 0.01, 0.2), (0.0, 0.03, 0.1)])
def test_no_false_alarm_where_nothing_differs(truth):
    assert verdicts(400, *truth).count("fail") <= 1


@pytest.mark.parametrize("truth", [(0.07, 0.01), (0.07, 0.018), (0.07, 0.008, 0.05)])
def test_a_slowdown_beyond_the_tolerance_is_found(truth):
    told = verdicts(200, *truth)
    assert told.count("fail") >= 195 and "pass" not in told


def test_clear_cases_end_at_the_first_look():
    for slowdown, verdict in ((-0.1, "pass"), (0.2, "fail")):
        pairs, judged = sample(machine(0, slowdown, 0.005), FOREVER, GATE, lambda: 0.0)
        assert judged.verdict == verdict and len(pairs) == LOOKS[0].pairs


def test_the_interval_holds_the_truth_whenever_it_stops():
    ended = [sample(machine(seed, 0.05, 0.01), FOREVER, GATE, lambda: 0.0)[1].speedup for seed in range(400)]
    assert sum(found.low <= 1 / 1.05 <= found.high for found in ended) >= 370


def test_sides_take_turns_in_being_first():
    order = []
    sample(lambda first: order.append(first) or pair(0.0), BenchSettings(processes=6), GATE, lambda: 0.0)
    assert order == [0, 1, 0, 1, 0, 1]


def test_time_ends_it_and_two_pairs_are_always_measured():
    for seconds, pairs in ((0.5, 2), (7.5, 7)):
        clock = count()
        told = sample(machine(0, 0.05, 0.05), BenchSettings(max_seconds=seconds), GATE, partial(next, clock))
        assert len(told[0]) <= pairs and told[1].verdict == "inconclusive"
    assert len(sample(machine(0, 0.05, 0.05), BenchSettings(max_seconds=0.1), GATE, partial(next, count()))[0]) == 2


def test_without_a_gate_the_first_look_is_enough():
    pairs, judged = sample(machine(0, 0.3, 0.01), FOREVER, None, lambda: 0.0)
    assert len(pairs) == LOOKS[0].pairs and judged.verdict == "pass" and judged.error == ERROR


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([pair(s) for s in (0.0, 0.001, -0.001, 0.002)], ""),
        ([pair(0.2 + s, s) for s in (0.0, 0.001, -0.001, 0.002)], "by CPU time the speedup is 1.000x"),
        ([pair(s, preempted=1) for s in (0.0, 0.001, -0.001, 0.002)], "50% of the runs lost their core"),
        (
            [pair(s, preempted=1) for s in (0.0, 0.001, -0.001, 0.002)],
            "speedup is of the rounds that kept their core",
        ),
        ([pair(log(1.05) + s) for s in (-0.03, 0.03, -0.02, 0.02)], "it sits on the bound"),
        ([pair(s) for s in (-0.1, 0.1, -0.05, 0.05)], "more --max-seconds"),
    ],
)
def test_hints(pairs, says):
    left = iter(pairs)
    made, judged = sample(lambda first: next(left), BenchSettings(processes=len(pairs)), GATE, lambda: 0.0)
    told = " ".join(hints(judged, interval([p.cpu_log_ratio for p in made], judged.error), made, GATE))
    assert says in told if says else told == ""


def test_summary_has_percentiles_of_all_runs_and_medians_over_processes():
    sides = [SideTimes("x", {}, load, 5.0, 100, list(range(1, 51)), 5) for load in (1.0, 2.0, 9.0)]
    found = summary(sides)
    assert found["median_ms"] == found["p50_ms"] == 25.5 and found["load_ms"] == 2.0
    assert found["p90_ms"] < found["p95_ms"] < found["p99_ms"] <= 50
    assert found["runs"] == 150 and found["preempted"] == pytest.approx(0.1) and found["peak_memory_bytes"] == 100
    assert found["calls_per_second"] == pytest.approx(1e3 / 25.5)


def test_verdict_is_where_the_whole_interval_lies():
    gate = Gate.parse("speedup >= 1.1")
    assert gate.verdict(1.1, 1.3) == "pass"
    assert gate.verdict(0.9, 1.09) == "fail"
    assert gate.verdict(1.0, 1.2) == "inconclusive"
    latency = Gate.parse("latency<=1.03")
    assert latency.verdict(0.98, 1.02) == "pass"
    assert latency.verdict(0.9, 0.96) == "fail"
    assert latency.verdict(0.96, 1.02) == "inconclusive"


@pytest.mark.parametrize(
    "text", ["", "latency", "latency>=1.03", "speedup<=1.1", "latency<=x", "latency<=0", "fps>=3", "speedup>=1e6"]
)
def test_a_gate_that_says_something_else_is_refused(text):
    with pytest.raises(InputError, match=r"latency<=1.03 or speedup>=1.1"):
        Gate.parse(text)


@pytest.mark.parametrize("bound", [1e-6, 0.5, 1.1, 20.0, 1e3])
def test_a_gate_is_read_as_it_is_written(bound):
    gate = Gate("speedup", bound)
    assert Gate.parse(str(gate)) == gate

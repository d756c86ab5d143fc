"""Whether the stop-watch can be believed."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from exporters.latency.paired import Gate, paired_latency
from exporters.machine import machine_name
from exporters.settings import LatencySettings
from slimdiff.errors import InputError

QUICK = LatencySettings(rounds=16, warmup=1)


class Simulated:
    """A machine whose runs take 10 ms with noise, the candidate `factor` times that, each run `drift` longer."""

    def __init__(self, seed: int, factor: float = 1.0, noise: float = 0.05, drift: float = 0.0):
        self.generator, self.factor, self.noise, self.drift = np.random.default_rng(seed), factor, noise, drift
        self.now, self.runs, self.order = 0.0, 0, ""

    def clock(self) -> float:
        return self.now

    def run(self, factor: float, name: str) -> None:
        self.runs += 1
        self.order += name
        seconds = 0.01 * factor * np.exp(self.noise * self.generator.standard_normal())
        self.now += seconds * (1 + self.drift * self.runs)

    def measure(self, rounds: int = 20, **options) -> dict:
        settings = LatencySettings(rounds=rounds, warmup=0)
        sides = (lambda: self.run(1.0, "A"), lambda: self.run(self.factor, "B"))
        return paired_latency(*sides, settings, clock=self.clock, **options)


def test_the_same_against_itself_is_1_within_the_interval():
    """Of 95 % intervals some 5 in 100 miss; the median's are a little off for few rounds."""
    results = [Simulated(seed).measure()["speedup"] for seed in range(100)]
    inside = sum(r["low"] <= 1 <= r["high"] for r in results)
    assert inside >= 88
    assert all(r["low"] <= r["median"] <= r["high"] for r in results)


def test_a_machine_that_slows_down_slows_both():
    speedup = Simulated(0, noise=0.0, drift=0.02).measure(rounds=20)["speedup"]
    assert speedup["median"] == pytest.approx(1, abs=0.02)
    assert speedup["low"] <= 1 <= speedup["high"]


def test_sides_take_turns_in_being_first():
    machine = Simulated(0)
    machine.measure(rounds=6)
    assert machine.order == "ABBAABBAABBA"


@pytest.mark.parametrize(("factor", "gate"), [(1.1, "latency<=1.03"), (0.8, "speedup>=1.5"), (1.0, "speedup>=1.2")])
def test_a_slowdown_fails(factor, gate):
    assert Simulated(1, factor).measure(gate=gate)["verdict"] == "fail"


@pytest.mark.parametrize(("factor", "gate"), [(0.8, "speedup>=1.1"), (0.8, "latency<=1.03"), (1.0, "latency<=1.1")])
def test_what_keeps_its_bound_passes(factor, gate):
    assert Simulated(1, factor).measure(gate=gate)["verdict"] == "pass"


def test_what_cannot_be_told_is_inconclusive():
    assert Simulated(2, noise=0.5).measure(rounds=6, gate="latency<=1.03")["verdict"] == "inconclusive"


def test_a_planted_slowdown_is_found_by_the_real_clock():
    result = paired_latency(
        lambda: time.sleep(0.004), lambda: time.sleep(0.016), QUICK, gate="latency<=1.03", runtime="python"
    )
    assert result["verdict"] == "fail" and result["speedup"]["high"] < 0.9
    assert result["candidate"]["median_ms"] > result["baseline"]["median_ms"] > 3.9
    assert result["runtime"] == "python"


def test_the_real_clock_finds_no_difference_where_there_is_none():
    result = paired_latency(lambda: time.sleep(0.008), lambda: time.sleep(0.008), QUICK, gate="latency<=1.1")
    assert result["verdict"] != "fail"
    assert result["speedup"]["median"] == pytest.approx(1, abs=0.1)


def test_the_result_is_what_the_contract_says():
    result = Simulated(0).measure(gate="speedup>=1.10")
    assert {"verdict", "speedup", "baseline", "candidate", "runtime", "machine", "rounds"} <= set(result)
    assert set(result["speedup"]) == {"median", "low", "high"}
    assert set(result["baseline"]) == set(result["candidate"]) == {"median_ms", "p90_ms"}
    assert result["gate"] == "speedup>=1.1" and result["machine"] == machine_name()
    assert result["baseline"]["median_ms"] == pytest.approx(10, rel=0.1)
    assert result["baseline"]["p90_ms"] > result["baseline"]["median_ms"]
    json.dumps(result, allow_nan=False)


def test_without_a_gate_nothing_fails():
    result = Simulated(0, factor=2).measure()
    assert result["verdict"] == "pass" and result["gate"] is None


def test_the_same_measurements_give_the_same_interval():
    assert Simulated(5).measure()["speedup"] == Simulated(5).measure()["speedup"]
    assert Simulated(5, noise=0.0).measure()["speedup"] == pytest.approx({"median": 1, "low": 1, "high": 1})


def test_verdict_is_where_the_whole_interval_lies():
    gate = Gate.parse("speedup >= 1.1")
    assert gate.verdict(1.1, 1.3) == "pass"
    assert gate.verdict(0.9, 1.09) == "fail"
    assert gate.verdict(1.0, 1.2) == "inconclusive"
    latency = Gate.parse("latency<=1.03")
    assert latency.verdict(0.98, 1.02) == "pass"
    assert latency.verdict(0.9, 0.96) == "fail"
    assert latency.verdict(0.96, 1.02) == "inconclusive"


@pytest.mark.parametrize("text", ["", "latency", "latency>=1.03", "speedup<=1.1", "latency<=x", "latency<=0", "fps>=3"])
def test_a_gate_that_says_something_else_is_refused(text):
    with pytest.raises(InputError, match=r"latency<=1.03 or speedup>=1.1"):
        Gate.parse(text)


@pytest.mark.parametrize("bound", [1e-6, 0.5, 1.1, 20.0, 1e6])
def test_a_gate_is_read_as_it_is_written(bound):
    gate = Gate("speedup", bound)
    assert Gate.parse(str(gate)) == gate


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 6"):
        LatencySettings(rounds=5)


def test_the_machine_has_a_name():
    assert "core" in machine_name() and "\n" not in machine_name()

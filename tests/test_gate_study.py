"""The study of the gate: which run comes next, and its table. The planted work is tested with the gate's pairs."""

from __future__ import annotations

import json
from math import log

from benchmarks.gate_study import KINDS, next_kind, read_runs, table


def run(kind: str, verdict: str, seconds: float = 20.0) -> dict:
    truth = log(1.07) if kind == "slower" else 0.0
    measured = {"log_ratios": [truth - 0.01, truth + 0.01], "scatter": 0.01}
    return {"kind": kind, "verdict": verdict, "seconds": seconds, "process_pairs": 6, **measured}


def test_kinds_take_turns_until_there_are_enough(tmp_path):
    file = tmp_path / "runs.jsonl"
    assert read_runs(file) == []
    asked = []
    while kind := next_kind(read_runs(file), list(KINDS), 3):
        asked.append(kind)
        with file.open("a") as stream:
            stream.write(json.dumps(run(kind, "pass")) + "\n")
    assert asked == ["same", "slower"] * 3
    assert next_kind(read_runs(file), ["slower"], 4) == "slower"
    assert next_kind(read_runs(file), ["same"], 3) is None


def test_the_table_counts_verdicts():
    runs = [run("same", "pass")] * 98 + [run("same", "fail", 50.0), run("same", "inconclusive")]
    runs += [run("slower", "fail")] * 19 + [run("slower", "inconclusive", 140.0)]
    told = table(runs, "5%").splitlines()
    same, slower = (next(line for line in told if line.startswith(name)) for name in ("| the same", "| with more"))
    assert "| 100 | 98 | 1 | 1 | 1.0% (0.0% to 5.4%) | 20 | 50 |" in same and "| +0.00% (" in same
    assert "| 20 | 0 | 19 | 1 | 95.0% (75.1% to 99.9%) | 20 | 140 |" in slower and "| +7.00% (+6." in slower

"""The benchmarks of schedules run, and their intervals are of what was resampled."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from benchmarks import picture_latency
from benchmarks.schedule_accuracy import accuracy, lost_interval


def test_a_pictures_latency_is_held_against_its_prediction(monkeypatch, capsys):
    asked = ["--model", "tiny", "--steps", "4", "--pictures", "1", "--schedules", "0:1/1", "0:0.5/4", "--slim"]
    monkeypatch.setattr(sys, "argv", ["picture_latency", *asked])
    picture_latency.main()
    said = capsys.readouterr().out
    rows = re.findall(r"\| (\S+) \| (\S+) \| ([\d,]+) ms \| ([\d,]+) ms \| ([\d.]+) \| ([\d.]+) \|", said)
    assert [row[1] for row in rows] == ["0:1/1", "0:0.5/4"] * 2 and {row[0] for row in rows[:2]} == {"dense"}
    full, less = (int(row[2]) for row in rows[:2])
    assert 0 < less < full and float(rows[1][5]) == pytest.approx(int(rows[0][3]) / int(rows[1][3]), rel=0.1)
    assert all(0.3 < float(row[4]) < 3 for row in rows)


def test_points_lost_have_an_interval_over_captions():
    chance = np.random.default_rng(1)
    dense = np.stack([np.full(400, 3), np.full(400, 3)], 1)
    slim = np.stack([3 - (chance.random(400) < 0.1), np.full(400, 3)], 1)
    lost = accuracy(dense) - accuracy(slim)
    low, high = lost_interval(dense, slim)
    assert 0 < low < lost < high < 3 * lost
    assert lost_interval(dense, dense) == (0, 0)

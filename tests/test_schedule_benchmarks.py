"""The benchmarks of schedules run, and their intervals are of what was resampled."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from benchmarks import picture_latency
from benchmarks.schedule_accuracy import accuracy, lost_interval


def test_a_pictures_latency_is_held_against_its_prediction(monkeypatch, capsys):
    asked = ["--model", "tiny", "--steps", "4", "--pictures", "1", "--schedules", "0:1/1", "0:0.5/4"]
    monkeypatch.setattr(sys, "argv", ["picture_latency", *asked])
    picture_latency.main()
    said = capsys.readouterr().out
    rows = re.findall(r"\| (\S+) \| ([\d,]+) ms \| ([\d,]+) ms \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", said)
    assert [row[0] for row in rows] == ["0:1/1", "0:0.5/4"]
    full, less = (int(row[1]) for row in rows)
    assert 0 < less < full and float(rows[1][4]) == pytest.approx(full / less, rel=0.1)
    assert all(0.3 < float(row[3]) < 3 for row in rows)


def test_points_lost_have_an_interval_over_captions():
    chance = np.random.default_rng(1)
    dense = np.stack([np.full(400, 3), np.full(400, 3)], 1)
    slim = np.stack([3 - (chance.random(400) < 0.1), np.full(400, 3)], 1)
    lost = accuracy(dense) - accuracy(slim)
    low, high = lost_interval(dense, slim)
    assert 0 < low < lost < high < 3 * lost
    assert lost_interval(dense, dense) == (0, 0)

"""Scales and ticks of plots."""

from __future__ import annotations

from deploy.report.plots import Scale, linear_scale, log_scale


def test_scales():
    decades = log_scale([None, 0.0, 3e-5, 2e-3])
    assert decades == Scale(1e-5, 1e-2, logarithmic=True)
    assert decades.at(1e-5) == 0 and decades.at(1e-2) == 100
    assert [t.label for t in decades.ticks()] == ["1e-5", "1e-4", "0.001", "0.01"]
    assert log_scale([None, 0.0]) is None
    assert [t.label for t in Scale(0, 1000).ticks()] == ["0", "200", "400", "600", "800", "1000"]
    assert [t.label for t in log_scale([0.02, 0.05]).ticks()] == ["0.01", "0.02", "0.05", "0.1"]
    assert linear_scale([1.0, 1.0]).at(1.0) == 50

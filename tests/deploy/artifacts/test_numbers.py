"""Numbers as people read them."""

from __future__ import annotations

import pytest

from deploy.artifacts import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.21e-5, "3.2e-5"),
        (0.00571, "0.00571"),
        (12.345, "12.3"),
        (1234.4, "1234"),
        (-0.5, "\u22120.500"),
        (2.5e7, "2.5e7"),
        (9.996, "10.0"),
    ],
)
def test_digits(value, text):
    assert numbers.digits(value) == text


def test_numbers_have_units_and_true_signs():
    assert numbers.scaled(859_520_964) == "859.5\u00a0M"
    assert numbers.scaled(999) == "999"
    assert numbers.in_bytes(3_438_083_856) == "3.438\u00a0GB"
    assert numbers.change(-0.12) == "\u221212.0\u00a0%" and numbers.change(-1e-5) == "0.0\u00a0%"
    assert numbers.duration(204) == "3\u00a0min 24\u00a0s" and numbers.duration(3725) == "1\u00a0h 02\u00a0min"
    assert numbers.duration(59.97) == "1\u00a0min 00\u00a0s"
    assert numbers.measured(0.99999998) == "0.99999998" and numbers.measured(1.0) == "1.00"
    assert numbers.measured(None) == "undefined" and numbers.measured([2, 4]) == "2 \u00d7 4"


@pytest.mark.parametrize(("count", "amount", "size"), [(5_923_844, "5.92 M", "5.9 MB"), (999, "999", "999 bytes")])
def test_terminals_get_plain_characters(count, amount, size):
    assert numbers.amount(count) == amount and numbers.size(count) == size
    assert numbers.relative(100, 88) == "-12.0 %" and numbers.relative(0, 1) == "n/a"

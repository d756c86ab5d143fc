"""Costs are counted from shapes, and the model that they are counted of is left as it was."""

from __future__ import annotations

import torch
from torch import nn

from slimdiff.denoising.trajectory import Call
from slimdiff.planning.costs import count_macs


class Remembers(nn.Module):
    """Makes a table in its first call, as transformers do for their rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table: torch.Tensor | None = None

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        if self.table is None:
            self.table = torch.arange(4.0)
        return (self.linear(sample) + self.table,)


class Chooses(Remembers):
    """How much it computes depends on numbers."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return super().forward(sample[: int(timestep.sum())], timestep)


def call(rows: int, time: int) -> Call:
    return Call(0, time, {"sample": torch.ones(rows, 4), "timestep": torch.tensor([time])})


def test_counting_computes_nothing():
    assert count_macs(Remembers(), call(3, 1)) == 3 * 16
    huge = Call(0, 1, {"sample": torch.ones(1, 4).expand(10**12, 4), "timestep": torch.tensor([1])})
    assert count_macs(Remembers(), huge) == 10**12 * 16


def test_what_a_model_keeps_of_its_first_call_is_not_of_the_count():
    model = Remembers()
    count_macs(model, call(3, 1))
    expected = model.linear(torch.ones(1, 4)) + torch.arange(4.0)
    assert model.table is None and torch.equal(model(**call(1, 1).arguments)[0], expected)


def test_a_model_whose_numbers_decide_on_its_shapes_is_counted_by_running_it():
    assert count_macs(Chooses(), call(3, 2)) == 2 * 16

"""Ranks for slim UNets without calibration: enough for time, memory and sizes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from slimdiff import Budget
from slimdiff.groups import find_sites
from slimdiff.planning.budgets import most_removable, removed_within
from slimdiff.planning.costs import CostTable, parameter_costs
from slimdiff.planning.knapsack import Layer, choose, distances, find_layers
from slimdiff.planning.planner import chosen_sites
from slimdiff.settings import PlanSettings


def sliceable(denoiser: nn.Module) -> list[Layer]:
    """The layers that are slimmed by default, with the ranks they may take."""
    planning = PlanSettings()
    return find_layers(chosen_sites(find_sites(denoiser)[0], planning), planning.align)


def uniform_ranks(denoiser: nn.Module, budget: str, layers: Sequence[Layer] | None = None) -> dict[str, int]:
    """Ranks by module path: the same share goes from every transformer block, as a budget of parameters says.

    Args:
        layers: that may be cut, with the ranks they may take; `sliceable`'s if not given.
    """
    layers = layers or sliceable(denoiser)
    table = parameter_costs(denoiser, [site for layer in layers for site in layer.sites])
    removed = removed_within(Budget(budget), table, layers)
    savings = [table.savings(layer.path, layer.candidates) for layer in layers]
    picked = choose(savings, distances(layers, savings, [1.0] * len(layers), removed), removed)
    return {layer.path: layer.candidates[index] for layer, index in zip(layers, picked, strict=True)}


def ranks_for_speedup(
    denoiser: nn.Module, table: CostTable, speedup: float, layers: Sequence[Layer] | None = None
) -> dict[str, int]:
    """Ranks by module path that a table of latencies promises a speedup for.

    Random weights have no errors to weigh: a layer's is taken to be the square of the share that it loses, times its
    parameters. Where the table promises less at the smallest ranks, nine tenths of that are sought.

    Args:
        layers: as `uniform_ranks` takes them.
    """
    layers = layers or sliceable(denoiser)
    parameters = parameter_costs(denoiser, [site for layer in layers for site in layer.sites])
    removed = min(Budget(speedup=speedup).removed(table.dense), 0.9 * most_removable(table, layers))
    savings = [table.savings(layer.path, layer.candidates) for layer in layers]
    errors = []
    for layer in layers:
        saved = parameters.savings(layer.path, layer.candidates)
        errors.append(saved**2 / float(parameters.savings(layer.path, [0])[0]))
    picked = choose(savings, errors, removed)
    return {layer.path: layer.candidates[index] for layer, index in zip(layers, picked, strict=True)}

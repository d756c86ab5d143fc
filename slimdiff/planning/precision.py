"""Which layers a plan puts into int8, and how that is chosen together with ranks: in one knapsack.

Layers that a group's rank runs through are chosen together with it, as a unit: for every rank it may keep, any of the
few layers inside may go into int8. What int8 saves depends on the rank, and on the runtime and processor: a measured
table says it. What it errs is measured too, one layer at a time, in the dense model; errors add up, as those of ranks
do.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from slimdiff.calibration import distributed
from slimdiff.denoising.int8 import count_layer_macs, input_ranges, product_layers, rounded
from slimdiff.denoising.replay import Change
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.groups import GROUPS
from slimdiff.plan import LayerPlan
from slimdiff.planning.changes import affordable, is_large, squared_changes
from slimdiff.planning.costs import CostTable, batch_of, parameter_costs
from slimdiff.planning.knapsack import Layer, choose
from slimdiff.planning.sensitivity import STABLE, in_turn

log = logging.getLogger("slimdiff")

CALLS = 4
"""Recorded calls that a layer alone is measured on, at most, spread over those that there are; of large models, a
sample of each (`affordable`)."""
ALL_SUBSETS = 4
"""Layers of a unit of which every set may go into int8; of more, one after another, the best first."""
NOTHING_TO_GAIN = "it multiplies one row a sample, runs more than once, or its input is one number"
TOO_DEAR = "it costs too much for what it saves"
SLOWER = "it is not faster in int8 by the table"
Settled = Callable[[Mapping[str, float], Mapping[str, float]], bool]
"""Whether errors as they were known a call ago serve as well as those that are known now."""
OWN_BYTES, INT8_BYTES = 4, 1
"""Of a weight in a graph's file: in fp32, and in int8."""


@torch.no_grad()
def measure_int8(
    denoiser: nn.Module, calls: Sequence[Call], most: float | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """What each linear or convolution costs when it alone is in int8, by module path, and its multiply-adds.

    Ranges of inputs are those of all calls; for the rest see `errors_alone`.

    Args:
        most: that layers may cost together. No more calls are taken when another one no longer changes which layers
            that would be; if not given, `CALLS` are.

    Returns:
        the relative mean squared change of the noise prediction; and the multiply-adds of one sample. Layers that int8
        gains nothing for are in neither.

    Raises:
        InputError: if an input is not finite, or the model predicts nothing.
    """
    macs = {path: count / batch_of(calls[0]) for path, count in count_layer_macs(denoiser, calls[0]).items()}
    ranges = {path: ends for path, ends in input_ranges(denoiser, macs, calls).items() if ends[0] < ends[1]}
    settled = None if most is None else settled_within(macs, most)
    known = errors_alone(denoiser, list(ranges), calls, lambda path: rounded(denoiser, {path: ranges[path]}), settled)
    return known, {path: macs[path] for path in ranges}


@torch.no_grad()
def errors_alone(
    denoiser: nn.Module,
    paths: Sequence[str],
    calls: Sequence[Call],
    in_int8: Callable[[str], AbstractContextManager[Any]],
    settled: Settled | None = None,
) -> dict[str, float]:
    """What each layer costs when it alone is in int8: the relative mean squared change of the noise prediction.

    For the passes see `squared_changes`. Processes of one job share the layers out, as in `measure_sensitivities`. How
    long a call takes is logged when that is known.

    Args:
        in_int8: puts the layer at a path into int8, for the length of a block.
        settled: whether what was known a call ago does as well as what is known now. No more calls are then taken; if
            not given, `CALLS` are.

    Raises:
        InputError: if the model predicts nothing, or what is not finite.
    """
    process, processes = distributed.world()
    own = paths[process::processes]
    count = min(len(calls), CALLS)
    some = affordable(denoiser, in_turn([calls[i * len(calls) // count] for i in range(count)]))
    large = is_large(denoiser, some)
    changes = {path: Change(path, partial(in_int8, path)) for path in own}
    changed, energy = dict.fromkeys(paths, 0.0), 0.0
    known: dict[str, float] = {}
    for number, call in enumerate(some):
        told = partial(_tell, len(own), len(some) - number)
        how: Any = {"name": "int8, a layer alone", "large": large, "number": number, "expected": told}
        measure = partial(squared_changes, denoiser, call, changes, **how)
        parts = distributed.agree(measure)
        energy += parts[0][1]  # the same in every process
        if not 0 < energy < math.inf:
            raise InputError("the model predicts nothing, or what is not finite: int8 cannot be measured on it")
        for own_changed, _ in parts:
            for path, value in own_changed.items():
                changed[path] += value
        before, known = known, {path: changed[path] / energy for path in paths}
        if before and settled is not None and settled(before, known):
            log.info("int8: costs from %d of %d calls: the last changes no choice", number + 1, len(some))
            break
    return known


def _tell(layers: int, left: int, seconds: float) -> None:
    log.info("int8: what %d layers cost alone: about %.0f s a call, of %d calls at most", layers, seconds, left)


def choose_int8(errors: Mapping[str, float], macs: Mapping[str, float], most: float) -> list[str]:
    """The layers that go into int8: as many as the sum of errors allows, those first that cost least for their MACs.

    Args:
        errors: by layer, what it costs alone.
        most: that they may cost together.

    Returns:
        their paths, in the order of `errors`.
    """
    chosen, total = set(), 0.0
    for path in sorted(errors, key=lambda path: errors[path] / macs.get(path, 1)):
        if total + errors[path] <= most:
            total += errors[path]
            chosen.add(path)
    return [path for path in errors if path in chosen]


def settled_within(macs: Mapping[str, float], most: float) -> Settled:
    """Whether two measurements of errors put almost the same layers into int8: all but `STABLE` of their MACs.

    Args:
        macs: of the layers.
        most: that they may cost together.
    """

    def settled(before: Mapping[str, float], known: Mapping[str, float]) -> bool:
        one, other = (set(choose_int8(errors, macs, most)) for errors in (before, known))
        return sum(macs[path] for path in one ^ other) <= STABLE * sum(macs[path] for path in one | other)

    return settled


@dataclass(frozen=True)
class Unit:
    """What is chosen together: a module with the ranks it may keep, and the layers inside that may be in int8.

    A layer that no rank runs through is a unit of its own, of one rank.
    """

    path: str
    ranks: tuple[int, ...]
    errors: np.ndarray
    """By rank, what that errs."""
    products: tuple[str, ...]


@dataclass(frozen=True)
class _Option:
    rank: int
    int8: tuple[str, ...]
    saving: float
    error: float


def find_units(
    layers: Sequence[Layer], errors_of: Callable[[Layer], np.ndarray], others: Sequence[str], products: Sequence[str]
) -> list[Unit]:
    """The units of a model.

    Args:
        layers: that may be slimmed; `errors_of` gives what their candidates err.
        others: paths of modules that could be slimmed, and are not to be.
        products: paths of the layers that may be in int8.
    """
    slim = {layer.path: layer for layer in layers}
    inside: dict[str, list[str]] = {path: [] for path in slim}
    for product in products:
        inside.setdefault(_owner(product, [*slim, *others]) or product, []).append(product)
    units = []
    for path, members in inside.items():
        layer = slim.get(path)
        ranks, errors = ((1,), np.zeros(1)) if layer is None else (tuple(layer.candidates), errors_of(layer))
        units.append(Unit(path, ranks, errors, tuple(members)))
    return units


def choose_both(
    units: Sequence[Unit], table: CostTable, removed: float, int8_errors: Mapping[str, float]
) -> tuple[dict[str, int], list[str]]:
    """Ranks and precisions of least total error that save at least `removed`, in the table's unit (`knapsack.choose`).

    Returns:
        the rank of every unit that has several, and the layers in int8.
    """
    options = [_options(unit, table, int8_errors) for unit in units]
    savings, errors = ([np.array([getattr(o, name) for o in row]) for row in options] for name in ("saving", "error"))
    picked = [row[pick] for row, pick in zip(options, choose(savings, errors, removed), strict=True)]
    ranks = {unit.path: option.rank for unit, option in zip(units, picked, strict=True) if len(unit.ranks) > 1}
    return ranks, [path for option in picked for path in option.int8]


def _options(unit: Unit, table: CostTable, int8_errors: Mapping[str, float]) -> list[_Option]:
    """What a unit may be, without what errs more and saves no more than another."""
    slim = table.savings(unit.path, unit.ranks) if unit.path in table.layers else np.zeros(len(unit.ranks))
    by_product = {path: table.int8_savings(path, unit.ranks) for path in unit.products}
    worth = [path for path in unit.products if by_product[path][-1] > 0]
    worth.sort(key=lambda path: int8_errors[path] / by_product[path][-1])
    options = []
    for int8 in _subsets(worth):
        error = sum(int8_errors[path] for path in int8)
        saving = slim + sum((by_product[path] for path in int8), np.zeros(len(unit.ranks)))
        options += [
            _Option(rank, int8, float(s), float(e) + error)
            for rank, s, e in zip(unit.ranks, saving, unit.errors, strict=True)
        ]
    best, least = [], math.inf
    for option in sorted(options, key=lambda option: (-option.saving, option.error)):
        if option.error < least:
            best.append(option)
            least = option.error
    return best


def _subsets(worth: Sequence[str]) -> list[tuple[str, ...]]:
    """All sets of a few layers; of many, those that begin with the first ones."""
    counts = range(len(worth) + 1)
    if len(worth) > ALL_SUBSETS:
        return [tuple(worth[:count]) for count in counts]
    return [chosen for count in counts for chosen in itertools.combinations(worth, count)]


def layer_plans(
    denoiser: nn.Module, int8: Sequence[str], errors: Mapping[str, float], table: CostTable
) -> dict[str, LayerPlan]:
    """The precision of every linear and convolution, with the figure that kept it where it is not in int8.

    Args:
        table: that was planned by.
    """
    chosen, plans = set(int8), dict[str, LayerPlan]()
    slower = [path for path in table.int8 if max(table.int8[path].values()) <= 0]
    if table.int8 and len(slower) == len(table.int8):
        log.warning("int8 makes no layer faster by the table (%s): planned without it", dict(table.made_from))
    for path in product_layers(denoiser):
        error = errors.get(path)
        reason = NOTHING_TO_GAIN if error is None else SLOWER if path in slower else TOO_DEAR
        in_int8 = path in chosen
        plans[path] = LayerPlan(
            precision="int8" if in_int8 else "own", noise_error=error, reason=None if in_int8 else reason
        )
    return plans


def byte_costs(denoiser: nn.Module, layers: Sequence[Layer], products: Sequence[str]) -> CostTable:
    """Bytes of a graph's weights by rank and precision: fp32 and int8."""
    parameters = parameter_costs(denoiser, [site for layer in layers for site in layer.sites])
    ranks = {path: {r: n * OWN_BYTES for r, n in curve.items()} for path, curve in parameters.layers.items()}
    slim = {layer.path: layer for layer in layers}
    int8 = {}
    for path in products:
        saved = denoiser.get_submodule(path).get_parameter("weight").numel() * (OWN_BYTES - INT8_BYTES)
        owner = _owner(path, slim)
        carries = owner is not None and any(
            f"{owner}.{inner}" == path
            for site in slim[owner].sites
            for inner, *_ in GROUPS[site.group].layers(denoiser.get_submodule(owner))
        )
        int8[path] = {0: 0.0, slim[owner].dense_rank: float(saved)} if owner and carries else {1: float(saved)}
    return CostTable("bytes", parameters.dense * OWN_BYTES, ranks, int8=int8)


def _owner(path: str, modules: Sequence[str] | Mapping[str, object]) -> str | None:
    """The innermost of these modules that a layer lies in."""
    return max((m for m in modules if path.startswith(f"{m}.")), key=len, default=None)

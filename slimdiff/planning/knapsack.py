"""One rank per layer under a budget: a multiple-choice knapsack, and the allocations that it is compared with."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, brentq, milp
from scipy.sparse import lil_array

from slimdiff.errors import InputError
from slimdiff.groups.group import Site
from slimdiff.progress import working

log = logging.getLogger("slimdiff")

# A plan may remove this much more than the budget says, never less.
TOLERANCE = 0.004
# Candidate ranks per site are thinned to this many: the knapsack stays small, and neighbours differ by under 2 %.
MOST_CANDIDATES = 64
# Seconds that the solver may take for one choice; what it has by then is within a gap that a warning names.
SOLVE_SECONDS = 60.0
# Plans whose predicted errors differ by less than this are ties: the error is an estimate, and far from that exact.
SLACK = 0.005
# Sums are marked one by one, to see whether any lies in the window, where that takes no more marks than this.
MOST_MARKS = 2_000_000_000


@dataclass
class Layer:
    """Sites of one module, which share one rank, with the ranks it may take (rising; the last is the dense one)."""

    sites: list[Site]
    candidates: list[int]

    @property
    def path(self) -> str:
        return self.sites[0].path

    @property
    def dense_rank(self) -> int:
        return self.sites[0].dense_rank


def find_layers(sites: Sequence[Site], align: int) -> list[Layer]:
    """Sites by module; candidate ranks are multiples of `align` and a norm's groups, thinned to `MOST_CANDIDATES`."""
    by_path: dict[str, list[Site]] = {}
    for site in sites:
        by_path.setdefault(site.path, []).append(site)
    layers = []
    for members in by_path.values():
        dense = members[0].dense_rank
        step = math.lcm(align, members[0].multiple)
        ranks = list(range(step, dense, step))
        if len(ranks) > MOST_CANDIDATES:
            picks = np.unique(np.linspace(0, len(ranks) - 1, MOST_CANDIDATES).round().astype(int))
            ranks = [ranks[i] for i in picks]
        layers.append(Layer(members, [*ranks, dense]))
    return layers


@working("choose ranks")
def choose(
    savings: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
    removed: float,
    also: Sequence[np.ndarray] | None = None,
) -> list[int]:
    """One candidate per layer, least total error, at least `removed` and at most 0.4 % more saved: exactly.

    Where no choice saves that, the window begins at the least that one saves above it.

    Args:
        savings: per layer, what each candidate saves, in any unit.
        errors: per layer, each candidate's error.
        removed: what must go, above 0.
        also: per layer, what else each candidate saves: as much as possible of that goes among the choices whose error
            is within `SLACK` of the least.

    Returns:
        the index of each layer's candidate.
    """
    owner = np.concatenate([np.full(len(s), i) for i, s in enumerate(savings)])
    starts = np.searchsorted(owner, np.arange(len(savings)))
    one_each = lil_array((len(savings), len(owner)))
    one_each[owner, np.arange(len(owner))] = 1
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    saving = np.concatenate(list(savings)) / removed
    error = np.concatenate(list(errors))

    def solve(objective: np.ndarray, allowed: np.ndarray, *more: LinearConstraint) -> np.ndarray | None:
        whole, most = np.ones(len(owner)), allowed.astype(float)
        found = milp(
            objective,
            constraints=[*constraints, *more],
            integrality=whole,
            bounds=Bounds(0, most),
            options={"time_limit": SOLVE_SECONDS},
        )
        if found.status == 1 and found.x is not None:
            log.warning("the choice of ranks was stopped after %g s, %.2g from the best", SOLVE_SECONDS, found.mip_gap)
        return None if found.x is None else np.flatnonzero(found.x > 0.5)

    nearest = _nearest(savings, removed) / removed
    least = 1.0 if nearest <= 1 + TOLERANCE else nearest * (1 - 1e-9)
    window = LinearConstraint(saving[None, :], least, least * (1 + TOLERANCE))
    # The solver stops within 1e-6 of the least, and errors span a dozen decades: so the unit is what the choice costs,
    # and what alone costs more than a known choice is left out, until the two are of one size.
    unit, allowed = max(float(error.max()), 1e-300), np.ones(len(owner), dtype=bool)
    picked = solve(error / unit, allowed, window)
    while picked is not None and 0 < (best := float(error[picked].sum())) < 1e-2 * unit:
        unit, allowed = best, error <= best
        better = solve(np.where(allowed, error, 0) / unit, allowed, window)
        if better is None or error[better].sum() > best:
            break
        picked = better
    if picked is None:
        # Without a window that any combination of ranks fits, come as close to the budget as the ranks allow.
        enough = LinearConstraint(saving[None, :], 1, np.inf)
        picked = solve(saving + 1e-3 * error / unit, allowed, enough)
    elif also is not None and (best := float(error[picked].sum())) > 0:
        other = np.concatenate(list(also))
        allowed = error <= (1 + SLACK) * best
        near = LinearConstraint(np.where(allowed, error, 0)[None, :] / best, -np.inf, 1 + SLACK)
        better = solve(-other / max(other.max(), 1e-300), allowed, window, near)
        picked = picked if better is None else better
    if picked is None:
        raise InputError(f"no choice of ranks removes {removed:,.6g}")
    return [int(index) for index in picked - starts]


def _nearest(savings: Sequence[np.ndarray], removed: float) -> float:
    """The least that any choice saves and is at least `removed`; `removed` itself where that cannot be seen at once.

    A few large blocks reach few sums, and the solver takes long to see that none fits a window. Sums of whole numbers
    are marked as bits of one number, in units of their greatest common divisor, exactly.
    """
    whole = [np.rint(s) for s in savings]
    if any(np.abs(w - s).max() > 1e-6 * max(w.max(), 1) for w, s in zip(whole, savings, strict=True)):
        return removed  # milliseconds
    values = [{int(v) for v in w} for w in whole]
    unit = max(1, math.gcd(*(v for row in values for v in row)))
    least = math.ceil(removed / unit)
    if 2 * least * sum(len(row) for row in values) > MOST_MARKS:
        return removed
    sums, within = 1, (1 << (2 * least)) - 1
    for row in values:
        reached = 0
        for value in row:
            reached |= sums << (value // unit)
        sums = reached & within
    above = sums >> least
    return max(removed, (least + (above & -above).bit_length() - 1) * unit) if above else removed


def softmax_weights(scores: Sequence[float], temperature: float) -> list[float]:
    """The papers' allocation: shares that go in proportion to `softmax(-score / temperature)`, of mean 1."""
    raised = np.exp(-(np.array(scores) - min(scores)) / temperature)
    return [float(w) for w in raised / raised.mean()]


def distances(
    layers: Sequence[Layer], savings: Sequence[np.ndarray], weights: Sequence[float], removed: float
) -> list[np.ndarray]:
    """How far each candidate is from the share that should go from its layer, in proportion to the layer's weight.

    No layer loses more than its smallest candidate; what it cannot, the others do.
    """
    shares = [1 - np.array(layer.candidates) / layer.dense_rank for layer in layers]
    most = np.array([share[0] for share in shares])
    # What a layer would save if it went wholly, from what its smallest candidate saves.
    whole = np.array([s[0] / share[0] if share[0] > 0 else 0.0 for s, share in zip(savings, shares, strict=True)])

    def missing(scale: float) -> float:
        return float((np.minimum(scale * np.array(weights), most) * whole).sum()) - removed

    high = 1.0
    while missing(high) < 0 and high < 1e12:
        high *= 2
    scale = brentq(missing, 0, high) if missing(high) > 0 else high
    targets = np.minimum(scale * np.array(weights), most)
    return [(share - target) ** 2 * weight for share, target, weight in zip(shares, targets, whole, strict=True)]

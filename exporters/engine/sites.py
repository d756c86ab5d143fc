"""An engine's dims held against the plan, at every place where they can be read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporters.graphs.naming import compare_dims, layers_of, site_row
from exporters.graphs.reading import WEIGHTED
from slimdiff.errors import SlimdiffError
from slimdiff.groups import GROUPS

if TYPE_CHECKING:
    from slimdiff import Plan

PRODUCTS_END = "to_out.0"
"""The layer that attention's products go to."""


def compare_network(
    dims: Mapping[str, Sequence[int]],
    attention: list[dict[str, Any]],
    plan: Plan,
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Hold a parsed network against the plan: weight dims, and the head dims of the attention products.

    It gives `compare_dims`'s rows.

    Args:
        dims: module path -> `(out, in)`.
        only: the layers that are looked for, in a denoiser's part; products are, where the output projection is.
    """
    by_module = {row["module"]: row for row in attention}
    rows = compare_dims({module: tuple(shape) for module, shape in dims.items()}, plan, only)
    for name, site in plan.sites.items():
        inside = only is None or f"{site.path}.{PRODUCTS_END}" in only
        if inside and (key := GROUPS[site.group].product_dim):
            row = by_module.get(site.path, {})
            rows.append(site_row(name, site.path, {key: site.rank}, {key: row.get(key)}))
    return rows


def compare_layers(layers: Mapping[str, Sequence[Sequence[int]]], plan: Plan) -> list[dict[str, Any]]:
    """Hold the layers that an engine's inspector lists against the plan.

    Kernels merge and split what the graph has: `to_q`, `to_k` and `to_v` may be one product, heads a dim of their own.
    So a layer agrees if one of the tensors of the kernels made from it has the inner dim, or the per-head rank.

    Returns:
        one dict per site and layer: `site`, `layer`, `expected` (dims, one of them must be there), `found` (dims of
        the tensors around the kernels) and `ok`, which is None where no kernel is named after the layer.
    """
    rows = []
    for name, site in plan.sites.items():
        for layer, inner in layers_of(site).items():
            if not inner.checked:
                continue
            expected = sorted({site.rank, *(inner.before + n * site.heads * site.rank for n in inner.times)})
            nodes = [f"{site.path}.{layer}/{operator}" for operator in WEIGHTED]
            found = [list(shape) for node in nodes for shape in layers.get(node, [])]
            seen = {dim for shape in found for dim in shape}
            ok = bool(seen.intersection(expected)) if found else None
            rows.append({"site": name, "layer": layer, "expected": expected, "found": found, "ok": ok})
    return rows


def demand_plan(rows: Sequence[Mapping[str, Any]], where: str, error: type[SlimdiffError]) -> None:
    """Raise `error`, naming the first site, unless all rows are `ok`."""
    wrong = [row for row in rows if not row["ok"]]
    if wrong:
        first = wrong[0]
        raise error(
            f"{where} is not what the plan says at {len(wrong)} of {len(rows)} places, first at {first['site']}: "
            f"the plan has {first['expected']}, found {first['found']}"
        )


def demand_int8(found: Iterable[str], expected: Iterable[str], where: str, error: type[SlimdiffError]) -> None:
    """Raise `error`, naming the first layer, unless just those layers are in int8 that a graph says are."""
    there, said = list(found), list(expected)
    odd = [path for path in said if path not in there] + [path for path in there if path not in said]
    if odd:
        what = "is not in int8, and the graph says that it is" if odd[0] in said else "is in int8, and should not be"
        raise error(f"{where}: {odd[0]} {what} ({len(odd)} layers differ)")

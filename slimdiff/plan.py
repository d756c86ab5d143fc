"""The plan: which rank each site keeps, which layers are in int8, and what that was computed from.

Small, readable, versioned JSON.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from slimdiff.groups import GROUPS
from slimdiff.groups.group import Inner, Site
from slimdiff.settings import Forms
from slimdiff.storage.editable import Editable
from slimdiff.storage.manifest import replacing


def _known(group: str) -> str:
    if group not in GROUPS:
        raise ValueError(f"there is no group {group!r}: the groups are {', '.join(GROUPS)}")
    return group


class SitePlan(BaseModel):
    """What one site keeps."""

    model_config = ConfigDict(extra="forbid")

    group: Annotated[str, AfterValidator(_known)]
    path: str
    """The module's path in the denoiser."""
    heads: int = Field(ge=1)
    dense_rank: int = Field(ge=1)
    """The dense model's inner dimension: per head for attention, channels for feed_forward and resnet."""
    rank: int = Field(ge=1)
    """The inner dimension kept, in the same unit."""
    cost: int = Field(ge=1)
    """Parameters per unit of rank."""
    multiple: int = Field(1, ge=1)
    """Ranks are multiples of this: the groups of a resnet's inner norm."""
    layers: dict[str, Inner] = {}
    """In a graph's plan, the layers that carry the rank, by path below the module, where they are not those that the
    group usually has: `axis`, `times`, `checked` and `before` of `Inner`."""
    local_error: float | None = None
    """Predicted relative error of the module's own output (of the scores, for query_key)."""
    sensitivity: float | None = None
    """How much the noise prediction's relative error grows per unit of local error, if it was measured."""
    predicted_error: float | None = None
    """Sensitivity times local error: this site's share of the noise prediction's relative mean squared error."""

    @model_serializer(mode="wrap")
    def _without_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without layers where they are the group's own."""
        content: dict[str, Any] = write(self)
        if not self.layers:
            content.pop("layers", None)
        return content


class LayerPlan(BaseModel):
    """The precision of one linear or convolution, in whatever group or none."""

    model_config = ConfigDict(extra="forbid")

    precision: Literal["own", "int8"]
    """`own`: that of the model it is in."""
    noise_error: float | None = Field(None, ge=0)
    """What int8 costs it alone, if it was measured: the relative mean squared change of the noise prediction."""
    reason: str | None = None
    """Why it keeps its own."""


class Plan(Editable):
    """Ranks by site name, in execution order of the modules, and precisions by module path."""

    noun: ClassVar[str] = "plan"

    model_class: str
    """The dense denoiser's class."""
    model_hash: str
    """Fingerprint of the dense denoiser's weights."""
    allocation: str
    forms: Forms = Forms().local()
    """The closed forms that its ranks were chosen for, and by which it is carried out."""
    align: int
    parameters: dict[str, int]
    """`dense`, `slim`: the denoiser's parameter counts; `budget`: what slim was to be, if parameters were budgeted."""
    budget: dict[str, str | float] = {}
    """What was asked for, such as `{"parameters": "12%"}` or `{"speedup": 1.35}`."""
    costs: dict[str, dict[str, float]] = {}
    """Further costs as predicted when the plan was made, where they are known: `macs` (of one sample) and `latency_ms`;
    `macs_per_image` and `latency_ms_per_image`, of dense and slim by the same schedule. Each has `dense`, `slim` and,
    if it was budgeted, `budget`."""
    noise_error: float | None = None
    """Relative mean squared change of the noise prediction, if the slim model was measured when the plan was made."""
    sites: dict[str, SitePlan]
    layers: dict[str, LayerPlan] = {}
    """Linears and convolutions whose precision was chosen, by module path; an export in int8 then follows it. None, as
    in plans of before: an export chooses."""
    left_dense: list[dict[str, str]] = []
    calibration: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        ranks: dict[str, int] = {}
        for name, site in self.sites.items():
            if name != f"{site.path}.{site.group}":
                raise ValueError(f"site {name!r} must be named {site.path}.{site.group}")
            if site.rank > site.dense_rank:
                raise ValueError(f"{name} keeps rank {site.rank}, but the dense model has {site.dense_rank}")
            if site.rank % site.multiple:
                raise ValueError(
                    f"{name} keeps {site.rank} channels: make it a multiple of {site.multiple}, its norm's groups"
                )
            if ranks.setdefault(site.path, site.rank) != site.rank:
                both = " and ".join(other.group for other in self.sites.values() if other.path == site.path)
                raise ValueError(
                    f"{site.path}: {both} must keep the same rank "
                    "(unequal head dimensions lose fused attention in every runtime)"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without layers where there are none, as plans have been written."""
        content: dict[str, Any] = write(self)
        if not self.layers:
            content.pop("layers", None)
        return content

    def int8(self) -> list[str]:
        """Paths of the layers that it puts into int8."""
        return [path for path, layer in self.layers.items() if layer.precision == "int8"]

    def __repr__(self) -> str:
        slimmed = sum(site.rank < site.dense_rank for site in self.sites.values())
        counts = {name: f"{count / 1e6:.3g}M" for name, count in self.parameters.items()}
        in_int8 = f", {len(self.int8())} layers in int8" if self.layers else ""
        budget = " ".join(f"{name} {value}" for name, value in self.budget.items()) or "no budget"
        return (
            f"Plan({self.model_class}, {budget}, {slimmed} of {len(self.sites)} sites slimmed, "
            f"parameters {counts['dense']} -> {counts['slim']}, allocation {self.allocation}{in_int8})"
        )

    def __str__(self) -> str:
        return repr(self)

    def save(self, path: Path) -> None:
        with replacing(path, is_file=True) as temporary:
            temporary.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def ranks(self) -> dict[str, int]:
        """Rank by module path."""
        return {site.path: site.rank for site in self.sites.values()}

    def is_fitted(self) -> bool:
        """Whether the slim model needs recorded calls to be fitted on."""
        fitted = any(GROUPS[site.group].fitted for site in self.sites.values() if site.rank < site.dense_rank)
        return fitted or self.forms.compensate != "none"

    def recount(self) -> Plan:
        """The same plan with `parameters.slim` counted from its ranks, as needed after an edit by hand.

        What else was found out about the ranks before goes with them.
        """
        removed = sum((s.dense_rank - s.rank) * s.cost for s in self.sites.values())
        slim = self.parameters["dense"] - removed
        stale: dict[str, Any] = {} if slim == self.parameters["slim"] else {"costs": {}, "noise_error": None}
        return self.model_copy(update={"parameters": {**self.parameters, "slim": slim}, **stale})


def site_plan(site: Site, rank: int, **errors: float | None) -> SitePlan:
    """What a site keeps, with `errors` as `SitePlan` names them."""
    known = {name: value for name, value in asdict(site).items() if name in SitePlan.model_fields}
    return SitePlan(**known, rank=rank, **errors)

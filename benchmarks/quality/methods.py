"""What is compared: ways to make a slim model of a size, and sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from benchmarks import baselines
from benchmarks.embedded.card import transformer_parameters
from benchmarks.obs_diff import obs_diff
from slimdiff import Budget, PlanSettings
from slimdiff.plan import Plan
from slimdiff.planning.costs import count_parameters
from slimdiff.settings import PAPERS, TRANSFORMER_GROUPS, Allocation, Forms

if TYPE_CHECKING:
    from benchmarks.quality.bench import Bench

ALL_GROUPS = (*TRANSFORMER_GROUPS, "resnet")
Baseline = Callable[["Bench", Plan], nn.Module]


@dataclass(frozen=True)
class Method:
    """A way to make a slim model of a given size.

    Attributes:
        label: in the tables.
        forms, allocation, groups, replans: of our own; baselines take the ranks of the uniform allocation.
        baseline: what is done instead of ours.
    """

    label: str
    forms: Forms = Forms()
    allocation: Allocation = "global"
    baseline: Baseline | None = None
    groups: tuple[str, ...] = TRANSFORMER_GROUPS
    replans: int = 0

    def settings(self) -> PlanSettings:
        return PlanSettings(forms=self.forms, allocation=self.allocation, groups=self.groups, replans=self.replans)


def _pruning(prune: Callable[[nn.Module, Plan], nn.Module]) -> Baseline:
    # Their algebra is on the CPU.
    return lambda bench, plan: prune(bench.on_cpu, plan).to(bench.device)


def _obs_diff(bench: Bench, plan: Plan) -> nn.Module:
    # How many pictures are made at once changes nothing but the time.
    sampling = bench.calibration.sampling.model_copy(update={"batch": bench.evaluation.batch})
    return obs_diff(bench.pipeline, plan, bench.prompts, sampling, bench.recorded.sensitivity)


SVD, MAGNITUDE = _pruning(baselines.plain_svd), _pruning(baselines.magnitude_pruning)
RANDOM, TORCH_PRUNING = _pruning(baselines.random_channels), _pruning(baselines.torch_pruning)

ATTENDED = PAPERS.model_copy(update={"value_moments": "attended"})
JOINT = ATTENDED.model_copy(update={"joint_output": True})
CENTRED = JOINT.model_copy(update={"centre_keys": True})
ELIMINATION = Forms(constant=False, compensate="none")
EVERYTHING = Forms(compensate="everything")

METHODS = {
    "global": Method("slimdiff, global"),
    "svd": Method("plain SVD", allocation="uniform", baseline=SVD),
    "magnitude": Method("magnitude pruning", allocation="uniform", baseline=MAGNITUDE),
    "obs-diff": Method("OBS-Diff, structured", allocation="uniform", baseline=_obs_diff),
    "uniform": Method("slimdiff, uniform", allocation="uniform"),
    "torch-pruning": Method("Torch-Pruning, group magnitude", allocation="uniform", baseline=TORCH_PRUNING),
    "random": Method("random channels", allocation="uniform", baseline=RANDOM),
    "papers-softmax": Method("papers' forms, softmax of block influence", PAPERS, "softmax"),
    "papers": Method("papers' forms, uniform", PAPERS, "uniform"),
    "attended": Method("+ value_output from what `to_out` receives", ATTENDED, "uniform"),
    "joint": Method("+ output solved over all heads", JOINT, "uniform"),
    "centred": Method("+ centred keys", CENTRED, "uniform"),
    "elimination": Method("+ elimination on the output error", ELIMINATION, "uniform"),
    "local": Method("+ knapsack on local errors", ELIMINATION, "local"),
    "sensitivity": Method("+ measured sensitivities", ELIMINATION),
    "constant": Method("+ constant column", Forms().local()),
    "compensated": Method("+ projections solved again (the default)"),
    "sequential": Method("default, last linears too, in order", Forms(compensate="sequential")),
    "everything": Method("everything linear solved again, in order", EVERYTHING),
    "replanned": Method("default, planned again", replans=1),
    "everything-replanned": Method("everything solved again, planned again", EVERYTHING, replans=1),
    "constant-resnet": Method("local forms + resnets, nothing compensated", Forms().local(), groups=ALL_GROUPS),
    "joint-resnet": Method("default + resnets, one knapsack", groups=ALL_GROUPS),
    "everything-resnet": Method("everything solved again, resnets too", EVERYTHING, groups=ALL_GROUPS),
    "replanned-resnet": Method("default + resnets, planned again", groups=ALL_GROUPS, replans=1),
    "everything-replanned-resnet": Method(
        "everything solved again, resnets too, planned again", EVERYTHING, groups=ALL_GROUPS, replans=1
    ),
    "resnet": Method("resnets alone", groups=("resnet",)),
    "magnitude-resnet": Method(
        "magnitude pruning, resnets too", allocation="uniform", baseline=MAGNITUDE, groups=ALL_GROUPS
    ),
    "torch-pruning-resnet": Method(
        "Torch-Pruning, resnets too", allocation="uniform", baseline=TORCH_PRUNING, groups=ALL_GROUPS
    ),
}
README = ("global", "svd", "magnitude", "uniform", "joint-resnet")
WHOLE = ("global", *(name for name in METHODS if name.endswith("resnet")))
ABLATION = tuple(name for name in METHODS if name not in ("uniform", *WHOLE))
THINGS = (
    "global",
    "obs-diff",
    "papers",
    "papers-softmax",
    "magnitude",
    "svd",
    "everything",
    "uniform",
    "torch-pruning",
)
THINGS_WHOLE = (
    *("joint-resnet", "everything-resnet", "magnitude-resnet", "replanned-resnet", "everything-replanned-resnet"),
    *("obs-diff", "global", "papers", "papers-softmax", "torch-pruning-resnet"),
)


@dataclass(frozen=True)
class Cut:
    """How much goes: percent of the transformer blocks' parameters, or of the whole UNet's."""

    percent: float
    whole: bool = False

    def __str__(self) -> str:
        return f"-{self.percent:g} %" + (" of the UNet" if self.whole else "")

    @property
    def slug(self) -> str:
        """In names of files."""
        return f"{'unet' if self.whole else 'blocks'}-{self.percent:g}"

    def budget(self, unet: nn.Module) -> Budget:
        return Budget(round(self.percent / 100 * (count_parameters if self.whole else transformer_parameters)(unet)))


TELLING = [
    *((name, Cut(30)) for name in THINGS[:5]),
    *((name, Cut(30, whole=True)) for name in THINGS_WHOLE[:3]),
    ("joint-resnet", Cut(20, whole=True)),
    *((name, Cut(50)) for name in THINGS[:5]),
]
"""What is measured of the things first, for time may run out."""

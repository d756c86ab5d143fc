"""Figures of a denoiser, alone and slim against dense, and when, by what and where they were made."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import slimdiff
from slimdiff.denoising.scheduled import Scheduled
from slimdiff.denoising.trajectory import Call, denoiser_name
from slimdiff.plan import Plan
from slimdiff.planning.costs import batch_of, count_bytes, count_macs, count_parameters, shallow_share
from slimdiff.planning.pictures import StepCosts
from slimdiff.storage import manifest


def denoiser_of(pipeline: Any) -> Any:
    """The pipeline's unet or transformer."""
    return getattr(pipeline, denoiser_name(pipeline))


def costs(denoiser: Any, call: Call) -> dict[str, int]:
    """`parameters`, `macs` of one sample (a guided call has two an image), and `bytes` of the weights as held."""
    return {
        "parameters": count_parameters(denoiser),
        "macs": count_macs(denoiser, call) // batch_of(call),
        "bytes": count_bytes(denoiser),
    }


def image_macs(dense: Any, slim: Any, call: Call, scheduled: Scheduled, runs: int) -> dict[str, Any]:
    """Multiply-adds of the denoiser's calls for an image: of dense, every step guided and whole, and of slim as it ran.
    `saved` is a share.

    Args:
        call: of one image, with all branches of guidance.
        scheduled: what slim's images were made with: its calls count, which image to image has fewer of.
        runs: of the pipeline, that made them.
    """
    depth, branches = scheduled.schedule.depth, batch_of(call)
    share = 1.0 if depth is None else shallow_share(slim, depth, call)
    steps = StepCosts.of_macs(share, branches).kinds
    whole = count_macs(dense, call) * scheduled.ran.total() / runs
    own = count_macs(slim, call) * sum(n * steps[kind] for kind, n in scheduled.ran.items()) / branches / runs
    return {"dense": round(whole), "slim": round(own), "saved": 1 - own / whole}


def compression_result(
    plan: Plan, dense: dict[str, int], slim: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    """What `slimdiff compress` reports, without `out`.

    `parameters.budget` is what the budget leaves; where the budget is in another unit, what the plan leaves.
    """
    figures: dict[str, Any] = {name: {"dense": dense[name], "slim": slim[name]} for name in dense}
    figures["parameters"]["budget"] = plan.parameters.get("budget", plan.parameters["slim"])
    return {
        **figures,
        "budget": plan.budget,
        "predicted": plan.costs,
        "noise_error": plan.noise_error,
        "sites": sum(site.rank < site.dense_rank for site in plan.sites.values()),
        "left_dense": plan.left_dense,
        "seconds": seconds,
    }


def made_now() -> dict[str, Any]:
    """`time` (UTC, ISO 8601), `versions` of packages, and `commit` of slimdiff's source, None where it is installed."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **manifest.versions()},
        "commit": source_commit(Path(slimdiff.__file__).parent),
    }


def source_commit(package: Path) -> str | None:
    """The git commit of a package's source, with `-dirty` if files were changed since; None if it is no checkout."""
    git = ["git", "-C", str(package)]
    try:  # a virtual environment may lie in somebody else's checkout, which does not track what is installed in it
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        named = [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(named, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """What this machine is: system, processor, cores that may be used, memory, GPUs."""
    import psutil
    import torch

    from exporters.machine import machine_name, usable_cores

    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": machine_name().split(",")[0],
        "cpus": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }

"""Running stages so that nothing is done twice and nothing is left half-written.

A stage writes into a folder of its own. Its key is the SHA-256 of everything that decides what it writes: its settings,
the contents of its input files, the versions and code that it runs, and the keys of the stages it needs. A folder whose
manifest carries the same key, and whose files are what the manifest says, is not made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.cli.console import log
from slimdiff.errors import InputError
from slimdiff.storage import manifest


def _anywhere(_folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One step of a build."""

    name: str
    run: Callable[[Path], None]
    """Writes the stage's files into the (new, empty) folder that it is given."""
    needs: tuple[str, ...] = ()
    """Stages that must be done before, whose results this one reads."""
    settings: Any = None
    """What the stage is told to do, as JSON."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of what it reads from outside the build, and of the code and versions that it runs."""
    kind: str = "stage"
    """What the manifest calls the folder."""
    runs_on: Callable[[Path], dict[str, Any]] = _anywhere
    """What the manifest says of where the result runs, read from the folder once it is written."""


@dataclass(frozen=True)
class Done:
    """What became of a stage."""

    name: str
    key: str
    seconds: float
    """How long the run took that made the folder."""
    reused: bool
    """Whether the folder was there already."""


def keys(stages: Sequence[Stage]) -> dict[str, str]:
    """The key of every stage; stages come after those they need."""
    found: dict[str, str] = {}
    for stage in stages:
        found[stage.name] = manifest.fingerprint(
            {
                "stage": stage.name,
                "settings": stage.settings,
                "inputs": dict(stage.inputs),
                "needs": {name: found[name] for name in stage.needs},
            }
        )
    return found


def forced(stages: Sequence[Stage], names: Collection[str]) -> set[str]:
    """`names` and every stage that depends on one of them.

    Raises:
        InputError: if a name is not a stage's.
    """
    known = [s.name for s in stages]
    for name in names:
        if name not in known:
            raise InputError(f"there is no stage {name!r} to force: stages are {', '.join(known)}")
    again = set(names)
    for stage in stages:
        if again.intersection(stage.needs):
            again.add(stage.name)
    return again


def run_stages(folder: Path, stages: Sequence[Stage], force: Collection[str] = ()) -> Iterator[Done]:
    """Do the stages in order, skipping those that are done; yields each as it is finished.

    A stage that raises leaves its folder as it was before. Finished stages stay, so the next run goes on from there.
    """
    again = forced(stages, force)
    for stage, key in zip(stages, keys(stages).values(), strict=True):
        target = folder / stage.name
        made_from = None if stage.name in again else _finished(target, key)
        if made_from is not None:
            log.info("%s: unchanged, skipped", stage.name)
            yield Done(stage.name, key, float(made_from.get("seconds", 0.0)), reused=True)
            continue
        log.info("%s: started", stage.name)
        start = time.perf_counter()
        with manifest.replacing(target) as temporary:
            stage.run(temporary)
            seconds = round(time.perf_counter() - start, 3)
            made = {"stage": stage.name, "key": key, "seconds": seconds, "settings": stage.settings}
            inputs = {"inputs": dict(stage.inputs)}
            manifest.write_manifest(temporary, stage.kind, made | inputs, stage.runs_on(temporary))
        log.info("%s: done in %.1f s", stage.name, seconds)
        yield Done(stage.name, key, seconds, reused=False)


def _finished(target: Path, key: str) -> dict[str, Any] | None:
    """What the manifest of a finished stage says it was made from; None if there is none, or it must be made again."""
    if not target.exists():
        return None
    try:
        made_from = manifest.read_manifest(target)["made_from"]
        if made_from.get("key") != key:
            return None
        manifest.verify_manifest(target)
    except InputError as error:
        log.warning("%s: made again, because %s", target.name, error)
        return None
    return made_from

"""Running stages so that nothing is done twice and nothing is left half-written.

A stage writes into a folder of its own. Its key is the SHA-256 of everything that decides what it writes: its settings,
the contents of its input files, the versions and code that it runs, and the keys of the stages it needs. A folder whose
manifest carries the same key, and whose files are what the manifest says, is not made again.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.artifacts.build_folder import strict
from slimdiff.errors import InputError
from slimdiff.storage import manifest

log = logging.getLogger("slimdiff")


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Stage:
    """One stage of a build, all that there is to say of it.

    Its functions take the shop: the build that they belong to, an object with at least the `folder` of all stages
    (`deploy.build.workshop.Workshop`).
    """

    name: str
    run: Callable[[Any, Path], dict[str, Any] | None]
    """Writes the stage's files, with the shop, into the new, empty folder of this stage. What it returns is the stage's
    result, which becomes `NAME.json` there."""
    needs: tuple[str, ...] | None = ()
    """Stages that must be done before, whose results this one reads; None: all that come before it."""
    settings: Callable[[Any], Any] = _nothing
    """The recipe's settings of the stage, as JSON."""
    inputs: Callable[[Any], Mapping[str, str]] = _nothing
    """Content hashes of what it reads from outside the build, and of the code and versions that it runs; the file that
    `run` is in is always among them."""
    kind: str = "stage"
    """What the manifest calls the folder."""
    runs_on: Callable[[dict[str, Any]], dict[str, Any]] = _nothing
    """What the manifest says of where the result runs."""
    packages: Callable[[Any], Sequence[tuple[str, str]]] = lambda _: ()
    """Optional modules that it imports, each with the extra that installs it."""
    figures: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """Its rows of the figures in `build.json`, dense against slim, from its result."""

    def also_decided_by(self, **hashes: str) -> Stage:
        """The same stage with more inputs."""
        return dataclasses.replace(self, inputs=lambda shop: {**self.inputs(shop), **hashes})


@dataclass(frozen=True)
class Done:
    """What became of a stage."""

    name: str
    key: str
    seconds: float
    """How long the run took that made the folder."""
    reused: bool
    """Whether the folder was there already."""


def keys(shop: Any, stages: Sequence[Stage]) -> dict[str, str]:
    """The key of every stage; stages come after those they need."""
    return {name: key for name, key, _ in _decided(shop, stages)}


def _decided(shop: Any, stages: Sequence[Stage]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name and key of every stage, and the settings and inputs that are in the key."""
    found: dict[str, str] = {}
    for stage in stages:
        code = {"steps": manifest.sha256_of(Path(inspect.getfile(stage.run)))}
        decided = {"settings": stage.settings(shop), "inputs": {**stage.inputs(shop), **code}}
        needs = {name: found[name] for name in (found if stage.needs is None else stage.needs)}
        found[stage.name] = manifest.fingerprint({"stage": stage.name, **decided, "needs": needs})
        yield stage.name, found[stage.name], decided


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
        if again and (stage.needs is None or again.intersection(stage.needs)):
            again.add(stage.name)
    return again


def run_stages(shop: Any, stages: Sequence[Stage], force: Collection[str] = ()) -> Iterator[Done]:
    """Do the stages in order, skipping those that are done; yields each as it is finished.

    A stage that raises leaves its folder as it was before. Finished stages stay, so the next run goes on from there.
    """
    again = forced(stages, force)
    for stage, (_, key, decided) in zip(stages, list(_decided(shop, stages)), strict=True):
        target = shop.folder / stage.name
        made_from = None if stage.name in again else _finished(target, key)
        if made_from is not None:
            log.info("%s: unchanged, skipped", stage.name)
            yield Done(stage.name, key, float(made_from.get("seconds", 0.0)), reused=True)
            continue
        log.info("%s: started", stage.name)
        _check_replaceable(target, stage.name)
        start = time.perf_counter()
        with manifest.replacing(target) as temporary:
            result = stage.run(shop, temporary)
            if result is not None:
                manifest.write_json(temporary / f"{stage.name}.json", strict(result))
            seconds = round(time.perf_counter() - start, 3)
            made_from = {"stage": stage.name, "key": key, "seconds": seconds, **decided}
            manifest.write_manifest(temporary, stage.kind, made_from, stage.runs_on(result or {}))
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


def _check_replaceable(target: Path, name: str) -> None:
    """Refuse to put a stage's folder in the place of what this stage did not write.

    Raises:
        InputError: naming it.
    """
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        own = manifest.read_manifest(target)["made_from"].get("stage") == name
        strange = next(manifest.strangers(target), None) if own else target
    except InputError:
        if (target / manifest.MANIFEST).is_file():  # damaged, and made again for that
            return
        strange = target
    if strange is not None:
        raise InputError(f"{strange} is not of this build, whose {name} would take its place: move it away")

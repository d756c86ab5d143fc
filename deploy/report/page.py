"""Pages for people: the report of a build and the page of a sweep, each one HTML file that needs nothing else."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from deploy.artifacts import build_folder as layout
from deploy.artifacts import numbers
from deploy.report.sections import SECTIONS, frontier
from slimdiff.storage.manifest import replacing

_FOLDERS = [Path(__file__).parent / name for name in ("templates", "sections")]


def write_report(build_folder: Path, out_file: Path) -> None:
    """Write the report of a build whose other stages are done.

    Raises:
        InputError: if a file of the build is missing or is not what it should be.
    """
    results: dict[str, Any] = {stage: layout.read(build_folder, stage) for stage in ("build", *layout.STAGES[:-1])}
    swept = any(stage["name"] == layout.SWEEP for stage in results["build"]["stages"])
    results["sweep"] = layout.read(build_folder, layout.SWEEP) if swept else None
    results["folder"] = build_folder
    shown = [section.build(results) for section in SECTIONS]
    write_page("report.html.j2", out_file, **results, **ChainMap(*shown))


def write_sweep_page(value: Mapping[str, Any], file: Path) -> None:
    """Write the page of a sweep, from the content of its `sweep.json`."""
    write_page("sweep.html.j2", file, sweep=value, **frontier.build({"sweep": value}))


def write_page(template: str, file: Path, **shown: Any) -> None:
    """Fill in a template, with the functions of `numbers` as filters; the file appears whole or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_FOLDERS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({name: show for name, show in vars(numbers).items() if callable(show)})
    environment.filters["yaml"] = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    text = environment.get_template(template).render(**shown)
    with replacing(file, is_file=True) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be no text

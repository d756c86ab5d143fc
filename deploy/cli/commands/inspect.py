"""`slimdiff inspect`: what an artifact is."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deploy.artifacts.kinds import kind_of
from deploy.cli import flags
from deploy.cli.console import LABELS, SHOWN, calm_libraries, log, result
from slimdiff.errors import InputError

DESCRIPTION = """Say what an artifact is: dims per site, parameters, MACs per sample where they can be counted,
bytes, provenance. What has a manifest is checked against it first."""
EXAMPLE = """examples:
  slimdiff inspect demo-slim
  slimdiff inspect slim-onnx --json"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.text(parser, "artifact", "DIR_OR_FILE", "what to look at")
    flags.add_variant(parser)


def run(args: argparse.Namespace) -> int:
    if args.artifact != "demo" and not Path(args.artifact).exists():
        raise InputError(f"{args.artifact}: there is no such file or folder")
    kind, variant = kind_of(args.artifact), flags.read_variants(args, args.artifact)[args.artifact]
    log.info("inspect: %s, %s", args.artifact, kind)
    calm_libraries()
    from deploy.opening.inspection import LOOK

    value = {
        "artifact": args.artifact,
        "kind": kind,
        **LOOK[kind](args.artifact, **({"variant": variant} if variant else {})),
    }
    return result(args, value, _text(value))


def _text(value: dict[str, Any]) -> str:
    lines = [f"{value['artifact']}: {value['kind']}"]
    for name, entry in value.items():
        if name in ("artifact", "kind", "sites", "left_dense", "provenance") or entry is None:
            continue
        if isinstance(entry, list) and entry and all(isinstance(item, dict) for item in entry):
            lines += [f"{name}:", *(f"  {_plain(item)}" for item in entry)]
        else:
            lines.append(f"{LABELS.get(name, name):14} {SHOWN.get(name, _plain)(entry)}")
    if sites := value.get("sites"):
        width = max(len(site["site"]) for site in sites)
        lines += ["", f"{'site':{width}}  dims"]
        lines += [f"{site['site']:{width}}  {site['dims']}" for site in sites]
    lines += [f"left dense: {row['site']} ({row['reason']})" for row in value.get("left_dense") or []]
    if value.get("provenance"):
        lines += ["", "provenance"]
        lines += [f"  {name}: {_plain(entry)}" for name, entry in value["provenance"].items() if entry]
    return "\n".join(lines)


def _plain(entry: Any) -> str:
    if isinstance(entry, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in entry.items())
    if isinstance(entry, list | tuple):
        return f"[{', '.join(_plain(item) for item in entry)}]"
    return str(entry)

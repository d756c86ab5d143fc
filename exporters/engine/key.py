"""What decides an engine, part by part: equal keys, the same engine; unequal ones, and the parts say what differs."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.dtypes import DTYPES, PRECISIONS
from exporters.engine.backends import installed_version
from exporters.graphs.int8_layers import is_int8
from exporters.graphs.reading import weight_files
from slimdiff.progress import bar
from slimdiff.storage import manifest

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporters.engine.gpu import Gpu
    from exporters.settings import EngineSettings
    from slimdiff import Plan

_BUILDER = ("worker.py", "network.py")


def engine_parts(
    onnx_file: Path,
    model: ir.Model,
    settings: EngineSettings,
    shapes: Mapping[str, Any],
    backend: str,
    gpu: Gpu | None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Everything that an engine follows from, as plain JSON.

    Args:
        onnx_file: hashed, and so are the files of external data beside it.
        gpu: the GPU that is here, which matters if the settings name no targets.

    Returns:
        `graph` and `weights` (SHA-256), `precision` (int8 if any layer is, else of most weights), `plan` (SHA-256 of
        its ranks), `shapes`, `options`, `versions`, `builder` (SHA-256 of our own code that builds), `runs_on`
        (`targets`, or the `gpu`).
    """
    sites = None if plan is None else {n: [s.group, s.path, s.heads, s.rank] for n, s in plan.sites.items()}
    here = Path(__file__).parent
    files = {name: onnx_file.parent / name for name in weight_files(onnx_file, model)}
    size = sum(file.stat().st_size for file in files.values())
    with bar(total=size, name="hash weights", unit="B", unit_scale=True, delay=2, leave=False) as shown:
        weights = {name: manifest.sha256_of(file, shown.update) for name, file in files.items()}
    return {
        "graph": manifest.sha256_of(onnx_file),
        "weights": weights,
        "precision": _precision(model),
        "plan": None if sites is None else manifest.fingerprint(sites),
        "shapes": dict(shapes),
        "options": {"workspace_gib": settings.workspace_gib, "tf32": settings.tf32},
        "versions": {
            backend: installed_version(backend),
            **{name: importlib.metadata.version(name) for name in ("polygraphy", "onnx")},
        },
        "builder": manifest.fingerprint([manifest.sha256_of(here / name) for name in _BUILDER]),
        "runs_on": {"targets": sorted(settings.targets)} if settings.targets or gpu is None else {"gpu": vars(gpu)},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the parts of two engines, e.g. `weights changed`, `options.tf32 False -> True`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    found = []
    for name in {**before, **after}:  # in order
        a, b = before.get(name), after.get(name)
        if a != b:
            hashes = name.partition(".")[0] in ("graph", "weights", "plan", "builder", "engines", "shallow")
            found.append(f"{name.partition('.')[0]} changed" if hashes else f"{name} {a} -> {b}")
    return list(dict.fromkeys(found))


def _precision(model: ir.Model) -> str:
    if is_int8(model):
        return "int8"
    counted: Counter[str] = Counter()
    for tensor in (weight.const_value for weight in model.graph.initializers.values()):
        if tensor is not None and (precision := PRECISIONS.get(DTYPES.get(tensor.dtype.name, ""))):
            counted[precision] += tensor.size
    return counted.most_common(1)[0][0] if counted else "none"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value

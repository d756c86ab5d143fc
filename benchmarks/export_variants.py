"""What the ways to write a graph cost: opset, attention in pieces or as one node, torch's exporters.

`python -m benchmarks.export_variants [--model sd15] [--runtime onnxruntime,openvino]` prints a Markdown table: the slim
UNet (the model's budget of parameters, random weights) in every variant, in process pairs with the graph that
`slimdiff export` writes, on one thread, and how far their outputs are apart. `exporters.settings.ExportSettings`
follows this table. What is measured is kept in `--out`, and not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.full_size import MODELS, random_calls
from benchmarks.random_models import random_unet
from benchmarks.ranks import uniform_ranks
from exporters.graphs.export import _OneAnswer, export_unet, unet_inputs, write_config
from exporters.latency.measure import bench
from exporters.latency.pair import Job
from exporters.machine import machine_name
from exporters.runtimes.opening import version_of
from exporters.runtimes.unet import UNet
from exporters.settings import BenchSettings, ExportSettings
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import SlimdiffError
from slimdiff.slimming.skeleton import skeleton
from slimdiff.storage import manifest


def in_opset(opset: int) -> Callable[[nn.Module, Call, Path], Path]:
    """Exporting with an opset that the settings may not allow."""
    settings = ExportSettings().model_copy(update={"opset": opset})
    return lambda unet, call, folder: export_unet(unet, folder, call, settings)


def by_older_exporter(unet: nn.Module, call: Call, folder: Path) -> Path:
    """The exporter by TorchScript, in the last opset that it has."""
    inputs = unet_inputs(call)
    folder.mkdir()
    file = folder / "model.onnx"
    torch.onnx.export(
        _OneAnswer(unet, list(inputs)),
        tuple(inputs.values()),
        str(file),
        dynamo=False,
        opset_version=20,
        input_names=list(inputs),
        output_names=["out_sample"],
    )
    write_config(unet, folder)
    return file


def with_fused_attention(unet: nn.Module, call: Call, folder: Path) -> Path:
    """Our graph with ONNX Runtime's own MultiHeadAttention, which other runtimes do not take."""
    file = export_unet(unet, folder, call)
    if fuse_attention(file) == 0:
        raise RuntimeError("no attention was found in the graph")
    return file


VARIANTS: dict[str, Callable[[nn.Module, Call, Path], Path]] = {
    "opset 20: GroupNorm in pieces": in_opset(20),
    "opset 21": in_opset(21),
    "opset 23: Attention as one node": in_opset(23),
    "older exporter, opset 20": by_older_exporter,
    "ONNX Runtime's MultiHeadAttention": with_fused_attention,
}


def fuse_attention(file: Path) -> int:
    """Put ONNX Runtime's MultiHeadAttention where a graph has products around a softmax.

    Returns:
        in how many places.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    makes = {name: node for node in graph.node for name in node.output}
    weights = {w.name: w for w in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def tokens(name: str) -> tuple[str, Any]:
        """The projection `[B, L, H * d]` that a tensor by heads comes from, and the shape it was given."""
        while makes[name].op_type != "MatMul":
            name, shape = makes[name].input[0], list(makes[name].input[1:])
        return name, shape[0]

    found = 0
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        scores, product = makes[softmax.input[0]], readers[softmax.output[0]][0]
        back = readers[readers[product.output[0]][0].output[0]][0]  # a transpose, then the reshape to [B, L, H * d]
        sides = [makes[name] for name in scores.input]
        if scores.op_type != "MatMul" or back.op_type != "Reshape" or {s.op_type for s in sides} != {"Mul"}:
            continue
        (query, heads), (key, _), (value, _) = (tokens(name) for name in (*scores.input, product.input[1]))
        factor = numpy_helper.to_array(weights[sides[0].input[1]]).item()
        node = helper.make_node(
            "MultiHeadAttention",
            [query, key, value],
            list(back.output),
            f"{softmax.name}/fused",
            domain="com.microsoft",
            num_heads=int(numpy_helper.to_array(weights[heads])[2]),
            scale=factor**2,
        )
        graph.node.insert(list(graph.node).index(back), node)
        graph.node.remove(back)
        found += 1
    _drop_unread(graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(file))
    return found


def _drop_unread(graph: Any) -> None:
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def measure(
    name: str, runtimes: Sequence[str], settings: BenchSettings, kept: Path, scratch: Path | None
) -> list[dict[str, Any]]:
    """Rows of the table: per variant its name, seconds of the export, and per runtime what was measured, or why not.

    Args:
        name: of `MODELS`.
        runtimes: of `exporters.runtimes`.
        settings: of the pairs.
        kept: folder of rows; those that are there are not measured again.
        scratch: folder for graphs; the system's if not given.
    """
    model = MODELS[name]
    call = random_calls(model, 1)[0]
    unet = random_unet(model)
    unet = skeleton(unet, uniform_ranks(unet, model.budget))
    rows = []
    with tempfile.TemporaryDirectory(dir=scratch, prefix="slimdiff-variants-") as folder:
        for told, export in tqdm(VARIANTS.items(), desc=f"{name}: variants"):
            decided = {"variant": told, "runtimes": list(runtimes), "settings": settings.model_dump()}
            decided |= {"machine": machine_name(), "versions": manifest.versions()}
            file = kept / f"{name}-{manifest.fingerprint(decided)[:8]}.json"
            if not file.is_file():
                start = time.perf_counter()
                variant = export(unet, call, Path(folder) / "variant")
                row: dict[str, Any] = {"variant": told, "seconds": time.perf_counter() - start, "runtimes": {}}
                ours = Path(folder) / "ours" / "model.onnx"
                if not ours.is_file():
                    export_unet(unet, ours.parent, call)
                for runtime in runtimes:
                    row["runtimes"][runtime] = _paired(ours, variant, runtime, call, settings)
                    gc.collect()
                shutil.rmtree(variant.parent)
                manifest.write_json(file, row)
            rows.append(json.loads(file.read_text(encoding="utf-8")))
    return rows


def _paired(ours: Path, other: Path, runtime: str, call: Call, settings: BenchSettings) -> dict[str, Any]:
    try:
        a, b = (UNet.open(file, runtime, 1) for file in (ours, other))
    except SlimdiffError as error:
        return {"refused": str(error)}
    expected, found = a.predict(call), b.predict(call)
    del a, b
    jobs = Job("ours", str(ours), runtime), Job("variant", str(other), runtime)
    return {"error": float((found - expected).norm() / expected.norm()), **bench(*jobs, settings)}


def table(name: str, rows: list[dict[str, Any]]) -> str:
    runtimes = list(rows[0]["runtimes"])
    lines = [
        "| variant | " + " | ".join(f"{r}, ours / variant (95 %) | relative L2" for r in runtimes) + " |",
        "| --- " * (1 + 2 * len(runtimes)) + "|",
    ]
    refused = []
    for row in rows:
        cells = [row["variant"]]
        for found in row["runtimes"].values():
            if "refused" in found:
                cells += ["not taken", "-"]
                refused.append(f"{row['variant']}: {found['refused']}")
            else:
                cells += ["{median:.3f} ({low:.3f} to {high:.3f})".format(**found["speedup"]), f"{found['error']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *refused] if refused else [""]
    lines.append(f"Above 1, the variant is faster than what `slimdiff export` writes (opset {ExportSettings().opset}).")
    versions = ", ".join(f"{runtime} {version_of(runtime)}" for runtime in runtimes)
    return "\n".join([*lines, f"{MODELS[name].budget} slim {name}, batch 1; {versions}; {machine_name()}, 1 thread."])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", choices=tuple(MODELS))
    parser.add_argument("--runtime", default="onnxruntime,openvino", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=6, help="process pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="blocks of each side in a pair (default: by their length)")
    parser.add_argument("--out", type=Path, default=Path("runs/export-variants"), help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="where the graphs go meanwhile (default: the system's)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    settings = BenchSettings(processes=args.processes, rounds=args.rounds, warmup=1, max_seconds=3600)
    print(table(args.model, measure(args.model, args.runtime.split(","), settings, args.out, args.scratch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

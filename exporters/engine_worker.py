"""Builds one engine in a process of its own: `python -m exporters.engine_worker JOB.json`, as `exporters.engine` does.

Polygraphy settles on TensorRT or TensorRT-RTX when it is first imported, and the builder can end the process it runs in
(out of memory, a fault in a parser): neither may happen to the process that asked for an engine. No torch, no slimdiff
in here: the builder needs the memory. Prints `stage: ...` lines on stdout, among Polygraphy's own.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from exporters.trt_network import describe_network, fused_attention


class Refused(Exception):
    """The job asks for something that cannot be had; the message says what can."""


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, describe, build and write one engine.

    Args:
        job: `backend`, `onnx_file`, `engine_file`, `targets` (`[major, minor]` pairs), `batch`, `workspace_gib`.

    Returns:
        `describe_network`'s keys with `version`, `bytes`, `seconds` and `fused_attention`.

    Raises:
        Refused: for targets or shapes that this backend does not take.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    rtx = job["backend"] == "tensorrt-rtx"
    trt = importlib.import_module("tensorrt_rtx" if rtx else "tensorrt")
    print("stage: starting the builder", flush=True)
    config = _config(trt, job, rtx)
    print("stage: parsing", flush=True)
    # Precision is in the graph. TensorRT 10 has to be told so, TensorRT 11 knows nothing else and lost the flag.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = NetworkFromOnnxPath(job["onnx_file"], strongly_typed=typed)()
    _fix_batch(network, job["batch"])
    described = describe_network(trt, network)
    print("stage: building", flush=True)
    start = time.perf_counter()
    plan = bytes(EngineBytesFromNetwork((builder, network, parser), config)())
    seconds = time.perf_counter() - start
    print("stage: writing", flush=True)
    Path(job["engine_file"]).write_bytes(plan)
    return {
        "version": trt.__version__,
        "bytes": len(plan),
        "seconds": round(seconds, 3),
        "fused_attention": fused_attention(plan),
        **described,
    }


def _config(trt: Any, job: dict[str, Any], rtx: bool) -> Any:
    limits = {}
    if job["workspace_gib"]:
        limits["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: int(job["workspace_gib"] * 2**30)}
    if not rtx:
        from polygraphy.backend.trt import CreateConfig

        return CreateConfig(**limits)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    targets = [tuple(target) for target in job["targets"]]
    known = sorted(name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    unknown = [name for name in (f"sm{major}{minor}" for major, minor in targets) if name not in known]
    if unknown:
        raise Refused(f"TensorRT-RTX {trt.__version__} has no target {', '.join(unknown)}; it has {', '.join(known)}")
    return CreateConfigRTX(compute_capabilities=targets or None, use_gpu=not targets, **limits)


def _fix_batch(network: Any, batch: int | None) -> None:
    """Give every open batch dim its size; other open dims are refused, and so is a batch that the graph contradicts."""
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = list(tensor.shape)
        if -1 in shape[1:] or (shape[:1] == [-1] and batch is None):
            raise Refused(
                f"input {tensor.name} has open dims {shape}, and engines are built for fixed shapes: "
                "say a batch, or export with fixed shapes"
            )
        if shape[:1] == [-1]:
            tensor.shape = [batch, *shape[1:]]
        elif shape and batch is not None and shape[0] != batch:
            raise Refused(f"the graph's {tensor.name} has batch {shape[0]}, the engine was asked for batch {batch}")


def main(argv: list[str]) -> int:
    """Do the job in the file `argv[0]`; write what came of it where the job says. 0: done, 2: refused."""
    job = json.loads(Path(argv[0]).read_text())
    try:
        result = build(job)
    except Refused as error:
        Path(job["result_file"]).write_text(json.dumps({"refused": str(error)}))
        return 2
    Path(job["result_file"]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

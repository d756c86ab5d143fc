"""Builds one engine in a process of its own, `worker_command("exporters.engine.worker", "JOB.json")`.

Polygraphy settles on TensorRT or TensorRT-RTX when it is first imported, and the builder can end the process it runs in
(out of memory, a fault in a parser): neither may happen to the process that asked for an engine. No torch in here: the
builder needs the memory. Prints `stage: ...` lines on stdout, among Polygraphy's own.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

from exporters.engine.network import describe_network, fused_attention, inspect_engine
from exporters.machine import peak_memory
from slimdiff.errors import InputError


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, describe, build and write one engine.

    Args:
        job: `backend`, `onnx_file`, `engine_file`, `targets` (`[major, minor]` pairs), `shapes` (`fixed`, input ->
            shape; or `profiles`, each input -> `min`, `opt`, `max`), `workspace_gib`, `tf32`, `inspect` (whether the
            engine can be opened here).

    Returns:
        `describe_network`'s keys with `version`, `bytes`, `seconds`, `peak_memory`, `fused_attention` and
        `engine_layers` (`inspect_engine`'s; None without a GPU).

    Raises:
        InputError: for targets that this backend does not have.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    rtx = job["backend"] == "tensorrt-rtx"
    trt = importlib.import_module("tensorrt_rtx" if rtx else "tensorrt")
    print("stage: starting the builder", flush=True)
    config = _config(trt, job, rtx)
    print("stage: parsing", flush=True)
    # Precision is in the graph. TensorRT 10 has a flag for that, TensorRT 11 knows nothing else.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = NetworkFromOnnxPath(job["onnx_file"], strongly_typed=typed)()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            tensor.shape = network_shape(job["shapes"], tensor.name)
    described = describe_network(trt, network)
    print("stage: building", flush=True)
    start = time.perf_counter()
    engine_bytes = bytes(EngineBytesFromNetwork((builder, network, parser), config)())
    seconds = time.perf_counter() - start
    print("stage: writing", flush=True)
    Path(job["engine_file"]).write_bytes(engine_bytes)
    if job["inspect"]:
        print("stage: inspecting", flush=True)
    return {
        "version": trt.__version__,
        "bytes": len(engine_bytes),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
        "fused_attention": fused_attention(engine_bytes),
        "engine_layers": inspect_engine(trt, engine_bytes) if job["inspect"] else None,
        **described,
    }


def network_shape(shapes: dict[str, Any], name: str) -> list[int]:
    """An input's shape in the network: -1 where profiles leave a dim open, and nowhere else.

    A graph may leave more open than its profiles do: what they all agree on is fixed in the network, too, so that
    kernels are chosen for fixed dims.
    """
    if "fixed" in shapes:
        return shapes["fixed"][name]
    ends = [profile[name][end] for profile in shapes["profiles"] for end in ("min", "max")]
    return [dims[0] if len(set(dims)) == 1 else -1 for dims in zip(*ends, strict=True)]


def _config(trt: Any, job: dict[str, Any], rtx: bool) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    options: dict[str, Any] = {
        # Else Polygraphy gives open dims a size of its own choosing.
        "profiles": [_profile(Profile(), shapes) for shapes in job["shapes"].get("profiles", [{}])],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # or the finished engine tells no dims
    }
    if job["workspace_gib"]:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: int(job["workspace_gib"] * 2**30)}
    if not rtx:
        return CreateConfig(**options, tf32=job["tf32"])
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    targets = [tuple(target) for target in job["targets"]]
    known = sorted(name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    unknown = [name for name in (f"sm{major}{minor}" for major, minor in targets) if name not in known]
    if unknown:
        raise InputError(
            f"TensorRT-RTX {trt.__version__} has no target {', '.join(unknown)}; it has {', '.join(known)}"
        )
    create = CreateConfigRTX(compute_capabilities=targets or None, use_gpu=not targets, **options)

    def with_tf32(builder: Any, network: Any) -> Any:
        """Polygraphy turns TF32 off for TensorRT, and leaves it on for TensorRT-RTX."""
        config = create(builder, network)
        (config.set_flag if job["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
        return config

    return with_tf32


def _profile(profile: Any, shapes: dict[str, dict[str, list[int]]]) -> Any:
    for name, ends in shapes.items():
        if ends["min"]:  # a scalar has no shape to give
            profile.add(name, ends["min"], ends["opt"], ends["max"])
    return profile


def main(argv: list[str]) -> int:
    """Do the job in the file `argv[0]`; write what came of it where the job says. 0: done, 2: refused."""
    job = json.loads(Path(argv[0]).read_text())
    try:
        result = build(job)
    except InputError as error:
        Path(job["result_file"]).write_text(json.dumps({"refused": str(error)}))
        return 2
    Path(job["result_file"]).write_text(json.dumps(result))
    return 0

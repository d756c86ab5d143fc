"""What TensorRT's errors mean, and what to do about them."""

from __future__ import annotations

import re

from exporters.engine.memory import build_memory


def stage_of(log: str) -> str:
    """What the worker was doing when its log ended."""
    return ["starting", *re.findall(r"^stage: (.*)$", log, re.MULTILINE)][-1]


def explain(code: int, log: str, weights: int) -> str:
    """Why a build failed and what to do, in one line.

    Args:
        code: exit status of the worker, negative for a signal.
        weights: bytes of the graph's weights.
    """
    stage = stage_of(log)
    if code == -9 or re.search(r"out of memory|bad_alloc|OutOfMemory|MemoryError|cudaError 2:", log):
        need = build_memory(weights) / 1e9
        return f"out of memory while {stage}: {weights / 1e9:.1f} GB of weights take about {need:.1f} GB to build"
    if unsupported := _unsupported(log):
        return unsupported
    if found := re.search(r"[Cc]ould not find any implementation for node ([^\n]*)", log):
        return (
            f"no kernel was found for {found[1].strip()}: give more workspace (workspace_gib), export in fp16, "
            "or build for fewer targets"
        )
    if found := re.search(r"Cannot compile operation '([^']*)' for [^(]*\((SM\d+)\): ([^.\n]*)", log):
        module = found[1].rpartition("/")[0] or found[1]
        return f"no kernel for {found[2].lower()} at {module} ({found[3]}): leave that target out, or export in fp16"
    if reason := next((meaning for pattern, meaning in _OPENING.items() if re.search(pattern, log)), None):
        return f"the engine build failed while {stage}: {reason}"
    errors = [line.strip() for line in log.splitlines() if "[E]" in line or "[!]" in line or "Error" in line]
    reason = errors[0].removeprefix("[E]").strip() if errors else f"exit status {code}"
    failed = f"the builder was ended by signal {-code}" if code < 0 else "the engine build failed"
    return f"{failed} while {stage}: {reason}"


_OPENING = {
    r"cudaError(?:_t)? (35|100|803|999)\b|CUDA initialization failure|driver version is insufficient": (
        "CUDA found no GPU that it can use: install or update the NVIDIA driver, and show the GPU to this process"
    ),
    r"not compatible with this version of TensorRT|[Vv]ersion tag does not match|serializationVersion": (
        "the engine is of another TensorRT version: build it again with the one that is here, or install that one"
    ),
    r"different compute capability|incompatible device|SM \d+ is not supported": (
        "the engine is for another GPU: build it on this one, or with this one's compute capability as a target"
    ),
}
"""Messages of TensorRT 10 and of TensorRT-RTX; of these only the driver's could be made to appear without a GPU."""


def _unsupported(log: str) -> str | None:
    """`In node 51 with name: a.b.attn1/Softmax and operator: Det (checkDet): UNSUPPORTED_NODE: ...`, the parser's."""
    found = re.search(r"In node -?\d+ with name: (\S*) and operator: (\S+) \((.*?)\): (\w+): ([^\n]*)", log)
    if found is None:
        return None
    name, operator, check, kind, why = found.groups()
    module = name.rpartition("/")[0] or name
    if kind in ("UNSUPPORTED_NODE", "UNSUPPORTED_GRAPH") or "Plugin not found" in why:
        return (
            f"TensorRT has no operator {operator} as the graph's module {module} uses it: export that with other "
            "operators (another opset or attention processor), or build with a backend that has it"
        )
    return f"TensorRT does not take the {operator} of the graph's module {module} ({check}): {why.strip()}"

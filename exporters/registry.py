"""What runs a model, a graph or an engine: one row a runtime. Loads none of them, nor torch.

A new runtime is a file with its session and a row, `register(Runtime(...))`: it is then taken wherever a runtime is
named. `exporters/runtimes/session.py` says what a session is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

from slimdiff.errors import InputError, require

Takes = Literal["model", "graph", "engine"]
Int8Format = Literal["Q/DQ", "dynamic", "QOperator"]
"""How a graph writes integer products: floats between quantisers, MatMulInteger, or QLinearMatMul and its like."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a denoiser; plain values alone, so that a row can be sent to another process."""

    name: str
    takes: Takes
    """A diffusers model, a `model.onnx`, or a folder with a `model.engine`."""
    module: str
    """That is imported."""
    opens: str
    """`module:function` that is called with the path, `threads` (None: its own choice) and `options` by name. It gives
    a `Session`; one that takes models also gets `batch`, and gives a `TorchModel`'s attributes."""
    title: str
    """For people, without its version."""
    extra: str = ""
    """Of slimdiff, which installs it; none: it comes with slimdiff."""
    device: Literal["cpu", "gpu"] = "cpu"
    precision: Literal["fp32", "bf16"] | None = None
    """That it computes in, whatever the graph's; None: the graph's, or its own choice."""
    rank: int = 100
    """The lowest is preferred where several are here."""
    options: Mapping[str, Any] = field(default_factory=dict)
    distributions: tuple[str, ...] = ()
    """That bring the module; by default one that is called like it."""
    clips: tuple[Int8Format, ...] = ()
    """Products by 8-bit weights that it computes wrongly where the processor has no VNNI: `exporters.graphs.int8`."""
    remedy: str = ""
    """What to do where it is missing; by default to install the extra."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that bring the module, the usual one first."""
        return self.distributions or (self.module,)

    def require(self) -> ModuleType:
        """Import its module.

        Raises:
            MissingPackageError: if it is not here, naming the extra.
        """
        return require(self.module, self.extra)

    def load(self) -> Any:
        """The function of `opens`; imports what it lies in."""
        module, _, function = self.opens.partition(":")
        return getattr(import_module(module), function)


_ONNXRUNTIME = Runtime(
    "onnxruntime",
    "graph",
    "onnxruntime",
    "exporters.runtimes.ort_session:OnnxRuntimeSession",
    "ONNX Runtime",
    "onnx",
    rank=7,
    options={"provider": "cpu"},
    distributions=("onnxruntime", "onnxruntime-gpu"),
    clips=("QOperator",),  # on a GPU too: what its provider does not take runs on the CPU
)
_ON_GPU = replace(_ONNXRUNTIME, extra="gpu", device="gpu")
_OPENVINO = Runtime(  # bf16 by itself where the CPU has that, which is the fastest
    "openvino",
    "graph",
    "openvino",
    "exporters.runtimes.openvino_session:OpenVinoSession",
    "OpenVINO",
    "openvino",
    rank=5,
    clips=("Q/DQ", "QOperator"),
)
_TENSORRT = Runtime(
    "tensorrt",
    "engine",
    "tensorrt",
    "exporters.runtimes.tensorrt_session:EngineSession",
    "TensorRT",
    "gpu",
    device="gpu",
    rank=0,
    options={"backend": "tensorrt"},
    distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    remedy="pip install 'slimdiff[gpu]', on Linux or Windows with an NVIDIA GPU",
)
_ROWS = (
    Runtime(
        "torch",
        "model",
        "torch",
        "exporters.runtimes.torch_model:TorchModel",
        "torch",
        rank=8,
        remedy="comes with slimdiff: pip install slimdiff",
    ),
    _ONNXRUNTIME,
    replace(_ON_GPU, name="onnxruntime-cuda", rank=3, options={"provider": "cuda"}),
    # Its rank is by speed alone: at the first call it builds an engine, for minutes.
    replace(_ON_GPU, name="onnxruntime-tensorrt", rank=2, options={"provider": "tensorrt"}),
    _OPENVINO,
    replace(_OPENVINO, name="openvino-fp32", precision="fp32", rank=6, options={"precision": "fp32"}),
    replace(_OPENVINO, name="openvino-bf16", precision="bf16", rank=4, options={"precision": "bf16"}),
    _TENSORRT,
    replace(
        _TENSORRT,
        name="tensorrt-rtx",
        module="tensorrt_rtx",
        title="TensorRT-RTX",
        extra="tensorrt-rtx",
        rank=1,
        options={"backend": "tensorrt-rtx"},
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        remedy="pip install 'slimdiff[tensorrt-rtx]'; builds engines without a GPU, running them needs an RTX GPU",
    ),
)
_REGISTERED = {row.name: row for row in _ROWS}


def register(runtime: Runtime) -> None:
    """Add a runtime.

    Raises:
        InputError: if there is one of that name.
    """
    if runtime.name in _REGISTERED:
        raise InputError(f"there is a runtime {runtime.name!r} already")
    _REGISTERED[runtime.name] = runtime


def names(*takes: Takes) -> tuple[str, ...]:
    """The runtimes that take one of these, or all of them; in the order in which they were added."""
    return tuple(name for name, row in _REGISTERED.items() if not takes or row.takes in takes)


def runtime_of(name: str, *takes: Takes) -> Runtime:
    """A runtime by its name.

    Raises:
        InputError: if there is none that takes one of these.
    """
    if name not in names(*takes):
        what = f" for {' and '.join(f'{kind}s' for kind in takes)}" if takes else ""
        raise InputError(f"there is no runtime {name!r}{what}; there is {', '.join(names(*takes))}")
    return _REGISTERED[name]


def installable() -> list[tuple[str, str, tuple[str, ...], str]]:
    """What is to be installed for the runtimes, each once.

    Returns:
        the name of its first runtime, the module, the distributions that bring it, and what to do where it is missing.
    """
    found: dict[str, tuple[str, str, tuple[str, ...], str]] = {}
    for row in _REGISTERED.values():
        remedy = row.remedy or f"pip install 'slimdiff[{row.extra}]'"
        found.setdefault(row.module, (row.name, row.module, row.packages, remedy))
    return list(found.values())

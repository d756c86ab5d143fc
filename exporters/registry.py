"""What runs a model, a graph or an engine: one row a runtime. Loads none of them, nor torch.

A new runtime is a file with its session and a row, `register(Runtime(...))`: it is then taken wherever a runtime is
named. `exporters/runtimes/session.py` says what a session is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from slimdiff.errors import InputError, require

Takes = Literal["model", "graph", "engine"]


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
    light: str = ""
    """Like `opens`, for processes that are timed: its session takes numpy's arrays, says dtypes in numpy's words, and
    needs no torch. None: such a process loads torch."""
    distributions: tuple[str, ...] = ()
    """That bring the module; by default one that is called like it."""
    remedy: str = ""
    """What to do where it is missing; by default to install the extra."""

    def require(self) -> ModuleType:
        """Import its module.

        Raises:
            MissingPackageError: if it is not here, naming the extra.
        """
        return require(self.module, self.extra)

    def installed(self) -> bool:
        """Whether its module can be found."""
        try:
            return find_spec(self.module) is not None
        except ImportError:  # a parent package that is not there
            return False

    def load(self, entry: str) -> Any:
        """The function of `opens` or `light`; imports what it lies in."""
        module, _, function = entry.partition(":")
        return getattr(import_module(module), function)


def _onnxruntime(provider: str, rank: int) -> Runtime:
    on_cpu = provider == "cpu"
    return Runtime(
        name="onnxruntime" if on_cpu else f"onnxruntime-{provider}",
        takes="graph",
        module="onnxruntime",
        opens="exporters.runtimes.ort_session:OnnxRuntimeSession",
        title="ONNX Runtime",
        extra="onnx" if on_cpu else "gpu",
        device="cpu" if on_cpu else "gpu",
        rank=rank,
        options={"provider": provider},
        light="exporters.runtimes.ort:ArraySession",
        distributions=("onnxruntime", "onnxruntime-gpu"),
    )


def _openvino(precision: Literal["fp32", "bf16"] | None, rank: int) -> Runtime:
    return Runtime(
        name=f"openvino-{precision}" if precision else "openvino",
        takes="graph",
        module="openvino",
        opens="exporters.runtimes.openvino_session:OpenVinoSession",
        title="OpenVINO",
        extra="openvino",
        precision=precision,
        rank=rank,
        options={"precision": precision},
    )


def _tensorrt(name: str, title: str, extra: str, rank: int, distributions: Iterable[str], remedy: str) -> Runtime:
    return Runtime(
        name=name,
        takes="engine",
        module=name.replace("-", "_"),
        opens="exporters.runtimes.tensorrt_session:EngineSession",
        title=title,
        extra=extra,
        device="gpu",
        rank=rank,
        options={"backend": name},
        distributions=tuple(distributions),
        remedy=f"pip install 'slimdiff[{extra}]'{remedy}",
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
    _onnxruntime("cpu", 7),
    # Ranks are by speed. ONNX Runtime's TensorRT provider builds an engine at the first call, for minutes.
    _onnxruntime("cuda", 3),
    _onnxruntime("tensorrt", 2),
    # On its own it computes in bf16 where the CPU has that, which is the fastest.
    _openvino(None, 5),
    _openvino("fp32", 6),
    _openvino("bf16", 4),
    _tensorrt("tensorrt", "TensorRT", "gpu", 0, ["tensorrt"], ", on Linux or Windows with an NVIDIA GPU"),
    _tensorrt(
        "tensorrt-rtx",
        "TensorRT-RTX",
        "tensorrt-rtx",
        1,
        ["tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"],
        "; builds engines without a GPU, running them needs an RTX GPU",
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


def unregister(name: str) -> None:
    """Take a runtime out that was added."""
    del _REGISTERED[name]


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


def packages() -> list[tuple[str, str, tuple[str, ...], str]]:
    """What is to be installed for the runtimes, each once.

    Returns:
        the name of its first runtime, the module, the distributions that bring it, and what to do where it is missing.
    """
    found: dict[str, tuple[str, str, tuple[str, ...], str]] = {}
    for row in _REGISTERED.values():
        remedy = row.remedy or f"pip install 'slimdiff[{row.extra}]'"
        found.setdefault(row.module, (row.name, row.module, row.distributions or (row.module,), remedy))
    return list(found.values())

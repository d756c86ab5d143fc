"""OpenVINO on the CPU, every shape compiled as a fixed one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporters.dtypes import DTYPES, PRECISIONS
from exporters.runtimes.session import Shape, open_dim
from slimdiff.errors import InputError, MissingPackageError, require

_HELD = 2  # what a pipeline alternates between at most: with and without guidance, full and last batch


class OpenVinoSession:
    """A graph in OpenVINO; a `Session`.

    A graph with open dims is compiled when it is first called with a shape, for that shape: fixed shapes were seen to
    be 10 to 25 % faster. The last two are held, weights and all.

    Args:
        precision: of the arithmetic; `None`: OpenVINO's own choice, bf16 where the CPU computes in it, else fp32.

    Raises:
        InputError: for a graph that OpenVINO does not load.
        MissingPackageError: if OpenVINO is not here, or this CPU does not compute in that precision.
    """

    def __init__(self, file: Path, threads: int | None = None, *, precision: Literal["fp32", "bf16"] | None = None):
        ov = require("openvino", "openvino")
        self._core = ov.Core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise MissingPackageError("this CPU does not compute in bf16: take the runtime openvino or openvino-fp32")
        own = self._core.get_property("CPU", "INFERENCE_PRECISION_HINT")
        hint = own if precision is None else {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}[precision]
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint}
        if threads is not None:
            self._options["INFERENCE_NUM_THREADS"] = threads
        self._compiled: OrderedDict[tuple[Shape, ...], Any] = OrderedDict()
        self.source = str(file)
        with self._explained():
            self._model = self._core.read_model(str(file))
        self.inputs: dict[str, Shape] = {i.get_any_name(): _shape(i) for i in self._model.inputs}
        self.outputs: dict[str, Shape] = {o.get_any_name(): _shape(o) for o in self._model.outputs}
        ports = (*self._model.inputs, *self._model.outputs)
        self.dtypes = {p.get_any_name(): DTYPES[p.element_type.get_type_name()] for p in ports}
        computes = PRECISIONS[DTYPES[hint.get_type_name()]]
        graph = next(PRECISIONS[d] for d in self.dtypes.values() if d in PRECISIONS)
        self.precision = graph if computes == "fp32" else computes
        self.runtime = f"OpenVINO {ov.__version__.partition('-')[0]}, CPU, {computes}"
        if not self._model.is_dynamic():
            self._request(tuple(self.inputs.values()))

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session`."""
        request = self._request(tuple(tuple(feed[name].shape) for name in self.inputs))
        found = request.infer([feed[name] for name in self.inputs], share_inputs=True)
        return {name: array.copy() for name, array in zip(self.outputs, found.values(), strict=True)}

    def _request(self, shapes: tuple[Shape, ...]) -> Any:
        if shapes not in self._compiled:
            model = self._model
            if model.is_dynamic():
                model = model.clone()
                model.reshape(dict(zip(self.inputs, map(list, shapes), strict=True)))
            while len(self._compiled) >= _HELD:
                self._compiled.popitem(last=False)
            with self._explained():
                compiled = self._core.compile_model(model, "CPU", self._options)
            self._compiled[shapes] = compiled.create_infer_request()
        self._compiled.move_to_end(shapes)
        return self._compiled[shapes]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the lines around the reason are places in OpenVINO's own source
            lines = [text for line in str(error).splitlines() if (text := line.strip())]
            reason = [text for text in lines if not text.startswith(("Exception from", "Check "))]
            raise InputError(f"OpenVINO does not load {self.source}: {' '.join(reason or lines)}") from error


def _shape(port: Any) -> Shape:
    name, dims = port.get_any_name(), enumerate(port.partial_shape)
    return tuple(dim.get_length() if dim.is_static else open_dim(name, axis) for axis, dim in dims)

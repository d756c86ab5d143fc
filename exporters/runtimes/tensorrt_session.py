"""TensorRT and TensorRT-RTX: an engine is checked against what was written when it was built, then opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.dtypes import DTYPES, PRECISIONS
from exporters.engine.check import ENGINE, check_engine, choose_profile
from exporters.registry import runtime_of
from exporters.runtimes.session import Shape, open_dim
from slimdiff.errors import InputError, MissingPackageError


class EngineSession:
    """An engine on the first GPU; a `Session`.

    Of an engine with several optimisation profiles, each call takes the first that holds its shapes. They share one
    context: a context keeps memory for all that the layers pass on, and as a pipeline's calls are of one shape from its
    first step to its last, a switch is paid for once an image. What is below the check of the engine takes a GPU, and
    was not tried: opening, running and switching.

    Args:
        folder: with `model.engine` and `engine.json`.
        threads: is not used: it runs on a GPU.

    Raises:
        InputError: if the folder is not what its manifest says, or the engine is for another runtime, version or GPU.
        MissingPackageError: if the runtime, or a GPU that torch sees, is not here.
    """

    def __init__(self, folder: Path, threads: int | None = None, *, backend: str):
        runtime = runtime_of(backend)
        self._report = check_engine(folder, backend)
        trt: Any = runtime.require()
        if not torch.cuda.is_available():
            raise MissingPackageError(f"engines take their data from torch, and torch {torch.__version__} has no CUDA")
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if self._engine is None:  # it says why on stderr, and raises nothing
            raise InputError(f"{runtime.title} {trt.__version__} does not open {folder / ENGINE}: build it again here")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        self.runtime = f"{runtime.title} {trt.__version__}, {torch.cuda.get_device_name()}"
        self.source = str(folder / ENGINE)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        shapes = {name: self._shape(name) for name in names}
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = {n: s for n, s in shapes.items() if modes[n] == trt.TensorIOMode.INPUT}
        self.outputs = {n: s for n, s in shapes.items() if n not in self.inputs}
        own = {name: DTYPES[self._engine.get_tensor_dtype(name).name] for name in names}
        int8 = self._report["parts"]["precision"] == "int8"
        self.precision = "int8" if int8 else PRECISIONS[own[next(iter(self.outputs))]]
        self._own = {name: getattr(torch, dtype) for name, dtype in own.items()}
        self.dtypes = {
            name: "float32" if dtype == "bfloat16" else dtype for name, dtype in own.items()
        }  # numpy has none

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Session`."""
        profile = choose_profile(self._report, {name: array.shape for name, array in feed.items()})
        with torch.cuda.stream(self._stream):
            # Before any shape is set: they are held against the profile that the context is in.
            if profile != self._context.active_optimization_profile and not (
                self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
            ):
                raise InputError(f"{self.source} does not switch to its profile {profile}: its log on stderr says why")
            tensors = {name: torch.from_numpy(array).to("cuda", self._own[name]) for name, array in feed.items()}
            for name, tensor in tensors.items():
                if not self._context.set_input_shape(name, tuple(tensor.shape)):
                    raise InputError(f"{self.source} does not take {name} of {tuple(tensor.shape)}, as its report says")
            for name in self.outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                tensors[name] = torch.empty(shape, dtype=self._own[name], device="cuda")
            for name, tensor in tensors.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise InputError(f"{self.source} does not run for these shapes: its log on stderr says why")
            return {name: tensors[name].to("cpu", getattr(torch, self.dtypes[name])).numpy() for name in self.outputs}

    def _shape(self, name: str) -> Shape:
        dims = enumerate(self._engine.get_tensor_shape(name))
        return tuple(size if size >= 0 else open_dim(name, axis) for axis, size in dims)

"""A UNet in ONNX Runtime that a diffusers pipeline takes in place of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from slimdiff.errors import InputError, MissingPackageError, require
from slimdiff.trajectory import Call

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int64)": torch.int64}


class OnnxUNet(nn.Module):
    """Drop-in for a pipeline's unet: `pipeline.unet = OnnxUNet("onnx/unet")`.

    Takes what a diffusers pipeline gives a UNet2DConditionModel, in any floating-point dtype and on any device, and
    answers in the same; the graph's own dtype is `dtype`. Data go through the CPU also for `cuda`: next to the UNet,
    that is nothing. A module, so that pipelines and hooks treat it as one, but moving or casting it does nothing: a
    session stays where it was opened.

    Args:
        path: a folder with `model.onnx` and `config.json`, or the `model.onnx` in it.
        provider: `cpu` or `cuda`.
        threads: of ONNX Runtime, within one operator; its own default if not given, or the cores that may be used.

    Raises:
        InputError: if the files are not there or are no UNet of ours.
        MissingPackageError: if ONNX Runtime or the provider is not here; it never falls back to another.
    """

    def __init__(self, path: Path | str, provider: str = "cpu", threads: int | None = None):
        super().__init__()
        file = Path(path) / "model.onnx" if Path(path).is_dir() else Path(path)
        config = file.parent / "config.json"
        for needed in (file, config):
            if not needed.is_file():
                raise InputError(f"there is no {needed}: a UNet in ONNX is model.onnx with config.json beside it")
        self.session = open_session(file, provider, threads)
        self.config = FrozenDict(json.loads(config.read_text()))
        self.inputs: dict[str, list[int | str]] = {i.name: list(i.shape) for i in self.session.get_inputs()}
        self._dtypes = {i.name: _DTYPES[i.type] for i in self.session.get_inputs()}
        if not {"sample", "timestep", "encoder_hidden_states"} <= set(self.inputs):
            raise InputError(f"{file} is no UNet: its inputs are {', '.join(self.inputs)}")
        self.provider = provider
        self.dtype: torch.dtype = self._dtypes["sample"]
        self.device = torch.device("cpu")
        # Whoever asks a module for its dtype by its first parameter gets the graph's.
        self.anchor = nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)
        if features := self.config.get("projection_class_embeddings_input_dim"):
            # SDXL pipelines read the width of the added embedding off the layer itself.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=features))

    def _apply(self, fn: Any, recurse: bool = True) -> OnnxUNet:
        return self

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: `[B, C, H, W]`.
            timestep: one whole number for all samples.
            encoder_hidden_states: `[B, L, D]`.
            added_cond_kwargs: SDXL's `text_embeds [B, E]` and `time_ids [B, 6]`.
            return_dict: as in diffusers.
            others: must be None; the graph has no input for them.

        Returns:
            the noise `[B, C, H, W]`, in sample's dtype, on its device.

        Raises:
            InputError: for a shape that the graph was not exported for, a timestep not whole, or other arguments.
        """
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown:
            raise InputError(f"the ONNX graph has no input for {', '.join(unknown)}")
        given: dict[str, Any] = {"sample": sample, "encoder_hidden_states": encoder_hidden_states}
        given |= {"timestep": _whole(timestep), **(added_cond_kwargs or {})}
        self._check(given)
        feed = {name: given[name].detach().to("cpu", self._dtypes[name]).numpy() for name in self.inputs}
        noise = torch.from_numpy(self.session.run(["out_sample"], feed)[0]).to(sample.device, sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    @torch.no_grad()
    def predict(self, call: Call) -> Tensor:
        """The output for a recorded call, `[B, C, H, W]`, float32 on the CPU."""
        return self(**call.to("cpu"), return_dict=False)[0].float()

    def _check(self, given: dict[str, Tensor]) -> None:
        if set(given) != set(self.inputs):
            raise InputError(f"the ONNX graph takes {', '.join(self.inputs)}; given were {', '.join(given)}")
        sizes: dict[str, int] = {}
        for name, takes in self.inputs.items():
            shape = tuple(given[name].shape)
            wanted = [d if isinstance(d, int) else sizes.setdefault(d, n) for d, n in zip(takes, shape, strict=False)]
            if len(shape) != len(takes) or list(shape) != wanted:
                raise InputError(
                    f"{name} has shape {shape}, but this graph takes "
                    + ", ".join(f"{n} ({', '.join(map(str, s))})" for n, s in self.inputs.items())
                )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(file: Path, provider: str, threads: int | None = None) -> Any:
    """An ONNX Runtime session that runs on the provider asked for, or none.

    Args:
        file: the graph.
        provider: `cpu` or `cuda`.
        threads: within one operator.

    Raises:
        InputError: for an unknown provider or a graph that ONNX Runtime does not load.
        MissingPackageError: if ONNX Runtime is not here, or would have fallen back to another provider.
    """
    if provider not in PROVIDERS:
        raise InputError(f"there is no provider {provider!r}; there is {' and '.join(PROVIDERS)}")
    ort = require("onnxruntime", "onnx" if provider == "cpu" else "gpu")
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise MissingPackageError(
            f"this onnxruntime has no {wanted}: pip install 'slimdiff[gpu]' in an environment of its own"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is None and usable_cores() < (os.cpu_count() or 1):
        # Its own choice counts cores that this process may not use; their threads then wait for one another.
        threads = usable_cores()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(str(file), options, providers=[wanted])
    except Exception as error:  # ONNX Runtime has a dozen exception classes and no common base
        raise InputError(f"ONNX Runtime does not load {file}: {str(error).splitlines()[0]}") from error
    # A provider whose libraries are missing is replaced by the CPU without an error.
    if session.get_providers()[0] != wanted:
        raise MissingPackageError(
            f"{wanted} could not start (CUDA or cuDNN libraries missing?); it runs on {session.get_providers()}"
        )
    return session


def _whole(timestep: Tensor | float | int) -> Tensor:
    values = torch.as_tensor(timestep).detach().cpu().flatten()
    if len(values) == 0 or not bool((values == values[0]).all()) or float(values[0]) != int(values[0]):
        raise InputError(
            f"the ONNX graph takes one whole timestep, given was {values.tolist()}: set the scheduler's "
            "timestep_spacing to 'leading' or 'trailing'"
        )
    return values[0].long()

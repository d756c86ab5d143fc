"""ControlNets, T2I-Adapters and image encoders in another runtime, in the places of a pipeline's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.configuration_utils import FrozenDict
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from exporters.graphs.inputs import named_inputs
from exporters.graphs.timesteps import graph_time
from exporters.layout import steering_folders
from exporters.runtimes.module import RuntimeModule, answer
from slimdiff.errors import InputError
from slimdiff.loading.steering import MultiControlNetModel


class ImageEncoder(RuntimeModule):
    """Drop-in for a pipeline's image_encoder, a CLIPVisionModelWithProjection, as IP-Adapters use it.

    Raises:
        InputError: if the session is none.
    """

    tensor = "pixel_values"

    def __init__(self, session: Any, config: Any):
        if set(session.inputs) != {"pixel_values"} or "penultimate_hidden_state" not in session.outputs:
            raise InputError(f"{session.source} is no image encoder: its inputs are {', '.join(session.inputs)}")
        super().__init__(session, SimpleNamespace(**config))

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> Any:
        """Of `[B, 3, S, S]` the embedding `[B, E]`, and hidden states `[B, 1 + patches, D]`: the last but one alone."""
        found = answer(self.session, {"pixel_values": pixel_values})
        states = (found["penultimate_hidden_state"].to(pixel_values.dtype), None)
        return SimpleNamespace(image_embeds=found["image_embeds"].to(pixel_values.dtype), hidden_states=states)


class ControlNet(RuntimeModule):
    """Drop-in for a pipeline's controlnet: `pipeline.controlnet = ControlNet.open("onnx/controlnet")`.

    Pipelines ask whether theirs is a `ControlNetModel`, and this one says that it is.

    Raises:
        InputError: if the session is no ControlNet.
    """

    tensor = "sample"
    __class__ = property(lambda _: ControlNetModel)  # type: ignore[assignment]

    def __init__(self, session: Any, config: Any):
        if "controlnet_cond" not in session.inputs or "mid_block_res_sample" not in session.outputs:
            raise InputError(f"{session.source} is no ControlNet: its inputs are {', '.join(session.inputs)}")
        RuntimeModule.__init__(self, session, FrozenDict(config))

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Any:
        """The ControlNet of a pipeline's folder; several (also `controlnet_1` and on) in diffusers' class for that."""
        nets = [cls.open(folder / one, runtime, threads) for one in steering_folders(folder)]
        return nets[0] if len(nets) == 1 else MultiControlNetModel(nets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """As `ControlNetModel.forward`, of what the graph has inputs for.

        Raises:
            InputError: for a shape that the graph was not exported for, or other arguments.
        """
        guessing = guess_mode and not self.config.get("global_pool_conditions")
        arguments = {
            "sample": sample,
            "timestep": graph_time(timestep, self.session.dtypes["timestep"], self.session.source),
            "encoder_hidden_states": encoder_hidden_states,
            "controlnet_cond": controlnet_cond,
            "conditioning_scale": torch.as_tensor(1.0 if guessing else conditioning_scale, dtype=torch.float32),
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            # IP-Adapters' embeddings are the UNet's alone, though SDXL's pipeline hands them over.
            "added_cond_kwargs": {k: v for k, v in (added_cond_kwargs or {}).items() if k != "image_embeds"},
            "cross_attention_kwargs": cross_attention_kwargs,
        }
        inputs, unknown = named_inputs(arguments)
        if unknown := unknown + [name for name in inputs if name not in self.session.inputs]:
            raise InputError(f"{self.session.source} has no input for {', '.join(unknown)}")
        found = answer(self.session, inputs)
        residuals = [found[name].to(sample.device, sample.dtype) for name in self.session.outputs]
        if guessing:  # as diffusers scales them: from a tenth at the outermost to all
            scales = torch.logspace(-1, 0, len(residuals)) * conditioning_scale
            residuals = [one * scale for one, scale in zip(residuals, scales, strict=True)]
        *down, mid = residuals
        return ControlNetOutput(tuple(down), mid) if return_dict else (down, mid)


class Adapter(RuntimeModule):
    """Drop-in for a pipeline's T2I-Adapter: `pipeline.adapter = Adapter.open("onnx/adapter")`."""

    tensor = "image"
    __class__ = property(lambda _: T2IAdapter)  # type: ignore[assignment]

    def __init__(self, session: Any, config: Any):
        if "image" not in session.inputs or "features_0" not in session.outputs:
            raise InputError(f"{session.source} is no T2I-Adapter: its inputs are {', '.join(session.inputs)}")
        RuntimeModule.__init__(self, session, config)
        self.downscale_factor = self.config["downscale_factor"]
        blocks = len(self.config["channels"])
        halvings = {"full_adapter_xl": 1, "light_adapter": blocks}.get(self.config["adapter_type"], blocks - 1)
        self.total_downscale_factor = self.downscale_factor * 2**halvings

    def forward(self, x: Tensor) -> list[Tensor]:
        """The features of pictures `[B, C, H, W]`, for the UNet's blocks in their order."""
        found = answer(self.session, {"image": x})
        return [found[name].to(x.device, x.dtype) for name in self.session.outputs]

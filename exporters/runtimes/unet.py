"""A UNet in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import ImageProjection
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from exporters.graphs.inputs import named_inputs
from exporters.graphs.reading import steps_of
from exporters.graphs.timesteps import graph_time
from exporters.runtimes.denoiser import GraphDenoiser
from exporters.runtimes.module import answer
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class UNet(GraphDenoiser):
    """Drop-in for a pipeline's unet: `pipeline.unet = UNet.open("onnx/unet", "openvino")`.

    Takes what a diffusers pipeline gives a UNet2DConditionModel or UNet2DModel, in any floating-point dtype and on any
    device, and answers in the same. Where the graph's size is fixed, `config.sample_size` is the graph's, so that a
    pipeline asked for no size makes images that it can make.

    Raises:
        InputError: if the session is no UNet.
    """

    tensor = "sample"

    def __init__(self, session: Session, config: dict[str, Any]):
        if not {"sample", "timestep"} <= set(session.inputs):
            raise InputError(f"{session.source} is no UNet: its inputs are {', '.join(session.inputs)}")
        height, width = session.inputs["sample"][-2:]
        size = {"sample_size": height} if isinstance(height, int) and height == width else {}
        super().__init__(session, FrozenDict(config | size))
        if features := config.get("projection_class_embeddings_input_dim"):
            # SDXL pipelines read the width of the added embedding off the layer itself.
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=features))
        if shown := [shape for name, shape in session.inputs.items() if name.startswith("image_embeds_")]:
            # Pipelines ask each IP-Adapter's projection whether it takes CLIP's embedding, or hidden states.
            kinds = [ImageProjection(1, 1, 1) if len(shape) == 3 else nn.Identity() for shape in shown]
            self.encoder_hid_proj = SimpleNamespace(image_projection_layers=kinds)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise.

        Args:
            sample: `[B, C, H, W]`.
            timestep: one for all samples; a whole number where the graph takes int64.
            encoder_hidden_states: `[B, L, D]`, but of an unconditional model.
            class_labels, timestep_cond, added_cond_kwargs, others: by the names and places of
                `exporters.graphs.inputs`; None where the graph has no input for them.

        Returns:
            the noise `[B, C, H, W]`, in sample's dtype, on its device.

        Raises:
            InputError: for a shape that the graph was not exported for, a timestep not whole, or other arguments.
        """
        inputs = self.named(
            sample=sample,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added_cond_kwargs,
            **others,
        )
        noise = answer(self.session, inputs)["out_sample"].to(sample.device, sample.dtype)
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def named(self, sample: Tensor, timestep: Tensor | float | int, **others: Any) -> dict[str, Tensor]:
        """A call's arguments as the graph's inputs; see `forward`."""
        timestep = graph_time(timestep, self.session.dtypes["timestep"], self.session.source)
        inputs, unknown = named_inputs({"sample": sample, "timestep": timestep, **others})
        if unknown := unknown + [name for name in inputs if name not in self.session.inputs]:
            raise InputError(f"{self.session.source} has no input for {', '.join(unknown)}")
        for name in self.session.inputs:
            if name.startswith("down_intrablock") and name not in inputs:  # where a T2I-Adapter is not applied any more
                inputs[name] = self._nothing(name, sample)
        if steered := [name for name in self.session.inputs if "residual" in name and name not in inputs]:
            raise InputError(
                f"a ControlNet steers {self.session.source}, and nothing was given for its input {steered[0]}: run it "
                "in the pipeline that it was exported with, or name the ControlNet (--controlnet)"
            )
        return inputs

    def _nothing(self, name: str, sample: Tensor) -> Tensor:
        """Zeros for an input whose height and width follow those of `sample`."""
        sizes = {}
        for size, dim in zip(sample.shape, self.inputs["sample"], strict=True):
            if isinstance(dim, str):
                step, side = steps_of(dim)
                sizes[side] = size // step
        dims = (dim if isinstance(dim, int) else steps_of(dim) for dim in self.inputs[name])
        return sample.new_zeros([dim if isinstance(dim, int) else dim[0] * sizes[dim[1]] for dim in dims])

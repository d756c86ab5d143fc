"""What steers a UNet beside its prompt, exported beside it: ControlNets, T2I-Adapters, IP-Adapters' image encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.graphs.export import (
    Denoiser,
    dtype_of,
    export_called,
    export_module,
    in_precision,
    in_steps,
    open_size,
    write_config,
)
from exporters.layout import IMAGE_ENCODER, INDEX
from exporters.settings import ExportSettings
from slimdiff.denoising.steering import has_ip_adapter, nets_of
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.loading.steering import features_of, pixels_of


class _ControlNet(Denoiser):
    """A ControlNet with tensors only: all residuals in a row."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        down, mid = self.answer(inputs)
        return (*down, mid)


class _Adapter(nn.Module):
    def __init__(self, adapter: nn.Module):
        super().__init__()
        self.adapter = adapter

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.adapter(image))


class _ImageEncoder(nn.Module):
    """CLIP's, as IP-Adapters take it: its embedding, and the last hidden states but one."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.image_encoder = encoder

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.image_encoder(pixel_values, output_hidden_states=True)
        return found.image_embeds, found.hidden_states[-2]


def check_image_encoder(pipeline: Any) -> None:
    """Refuse an image encoder that waits for an IP-Adapter: none can be loaded into graphs.

    Raises:
        InputError: saying what would be right.
    """
    waits = hasattr(pipeline, "load_ip_adapter") and getattr(pipeline, IMAGE_ENCODER, None) is not None
    if waits and not has_ip_adapter(pipeline):
        raise InputError(
            f"{type(pipeline).__name__} has an {IMAGE_ENCODER} and no IP-Adapter, which alone needs it: name one "
            f"(--ip-adapter FILE), or take it out ({IMAGE_ENCODER}=None; in {INDEX} [null, null])"
        )


def folders_of(pipeline: Any) -> dict[str, Any]:
    """The ControlNets or the adapter of a pipeline by the names of their folders: `controlnet_1` is the second."""
    kind = "controlnet" if getattr(pipeline, "controlnet", None) is not None else "adapter"
    return {kind if not i else f"{kind}_{i}": net for i, net in enumerate(nets_of(pipeline))}


def controlnet_call(net: Any, call: Call) -> Call:
    """The call of a ControlNet that goes with a call of its UNet, on a black picture."""
    sample = call.arguments["sample"][:, : net.config.in_channels]  # inpainting's has a mask and a picture, too
    height, width = (side * pixels_of(net) for side in sample.shape[-2:])
    added = call.arguments.get("added_cond_kwargs") or {}
    arguments = {
        "sample": sample,
        "timestep": call.arguments["timestep"],
        "encoder_hidden_states": call.arguments["encoder_hidden_states"],
        "controlnet_cond": sample.new_zeros(len(sample), net.config.conditioning_channels, height, width),
        "conditioning_scale": torch.tensor(1.0),
        "added_cond_kwargs": {name: added[name] for name in ("text_embeds", "time_ids") if name in added},
    }
    return replace(call, arguments=arguments)


def export_controlnet(net: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings) -> Path:
    """Export a ControlNet, open in the batch: guess mode asks it for half of what the UNet gets.

    Its inputs are `sample [B, C, H, W]`, `timestep`, `encoder_hidden_states [B, L, D]`, SDXL's, `controlnet_cond
    [B, 3, 8 H, 8 W]` and `conditioning_scale` (a scalar); its outputs `down_block_res_samples_0` and on, and
    `mid_block_res_sample`, times that scale.

    Args:
        call: of its UNet.
    """
    count = len(net.controlnet_down_blocks)
    outputs = [*(f"down_block_res_samples_{i}" for i in range(count)), "mid_block_res_sample"]
    opened = settings.model_copy(update={"dynamic_batch": True, "keep_fp32": []})
    own, scheduler = controlnet_call(net, call), pipeline.scheduler
    return export_called(_ControlNet, net, folder, own, opened, outputs, scheduler=scheduler)


def export_adapter(adapter: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings) -> Path:
    """Export a T2I-Adapter, open in the batch: `image [B, C, 8 H, 8 W]` to `features_0` and on.

    Args:
        call: of its UNet.
    """
    dtype, scale = dtype_of(settings), pipeline.vae_scale_factor
    height, width = (side * scale for side in call.arguments["sample"].shape[-2:])
    example = torch.zeros(2, adapter.config["in_channels"], height, width)
    opened: dict[int, Any] = {0: "batch"}
    if settings.dynamic_size:
        step = scale * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
        example = in_steps(example, step)
        opened |= open_size(step)
    count = len(features_of(adapter, 1, *example.shape[-2:]))
    wrapped = _Adapter(in_precision(adapter, dtype))
    inputs, names = {"image": example.to(dtype)}, [f"features_{i}" for i in range(count)]
    file = export_module(wrapped, inputs, names, folder, settings, {"image": opened}, "adapter.")
    write_config(adapter, folder)
    return file


def export_image_encoder(encoder: Any, folder: Path, _pipeline: Any, _call: Call, settings: ExportSettings) -> Path:
    """Export CLIP's vision model, open in the batch: `pixel_values [B, 3, S, S]` to `image_embeds [B, E]` and
    `penultimate_hidden_state [B, 1 + patches, D]`.
    """
    dtype, size = dtype_of(settings), encoder.config.image_size
    inputs = {"pixel_values": torch.zeros(2, encoder.config.num_channels, size, size, dtype=dtype)}
    wrapped, outputs = _ImageEncoder(in_precision(encoder, dtype)), ["image_embeds", "penultimate_hidden_state"]
    file = export_module(wrapped, inputs, outputs, folder, settings, {"pixel_values": {0: "batch"}}, "image_encoder.")
    write_config(encoder, folder)
    return file

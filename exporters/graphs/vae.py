"""The two halves of a VAE as graphs, and what of it a half-precision export keeps in fp32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.graphs.export import dtype_of, export_module, in_precision, in_steps, open_size, write_config
from exporters.graphs.inputs import latent_size
from exporters.graphs.precision import cast_tensor, paths_to_keep
from exporters.layout import latent_scale
from exporters.settings import ExportSettings, of_vae
from slimdiff.denoising.sizes import enlarges
from slimdiff.denoising.trajectory import Call, map_tensors
from slimdiff.errors import InputError


class VaeDecoder(nn.Module):
    """`latent_sample [B, C, h, w]` -> a tuple of `sample [B, 3, H, W]`. The VAE is its module `vae`."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae: Any = vae

    def forward(self, latent_sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """`sample [B, 3, H, W]` -> a tuple of `latent_parameters [B, 2 C, h, w]`, or of `latent_sample` where that is all.

    The VAE is its module `vae`.
    """

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae: Any = vae

    def forward(self, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        found = self.vae.encode(sample)
        if hasattr(found, "latent_dist"):
            return (found.latent_dist.parameters,)
        return (found.latent if hasattr(found, "latent") else found.latents,)


HALVES: dict[str, type[VaeDecoder | VaeEncoder]] = {"vae_decoder": VaeDecoder, "vae_encoder": VaeEncoder}


def settings_for_unet(unet: nn.Module, vae: nn.Module | None, settings: ExportSettings) -> ExportSettings:
    """The settings without the paths of VAE modules, once every path and pattern has matched something.

    Raises:
        InputError: for a path or pattern of no module.
    """
    own = paths_of_vae(settings) if vae is not None else []
    others = [path for path in settings.keep_fp32 if path not in own]
    paths_to_keep(unet, others)
    paths_to_keep(VaeDecoder(vae) if vae is not None else unet, own)
    return settings.model_copy(update={"keep_fp32": others})


def paths_of_vae(settings: ExportSettings) -> list[str]:
    """Those of `keep_fp32` that name modules of the VAE."""
    return [path for path in settings.keep_fp32 if of_vae(path)]


def is_half(vae: Any, settings: ExportSettings) -> bool:
    """Whether the VAE's graphs are in half precision, but for the modules that are kept in fp32.

    They are not where all of the VAE is kept, nor where its config asks for fp32 (`force_upcast`) and `keep_fp32` names
    none of its modules: who names them has looked which overflow.
    """
    kept = paths_of_vae(settings)
    return settings.precision == "fp16" and "vae" not in kept and bool(kept or not vae.config.get("force_upcast"))


def tile_call(call: Call, side: int, vae: Any, settings: ExportSettings) -> Call:
    """What `export_vae` takes in the place of a denoiser's call for graphs of tiles, `side` pixels high and wide.

    Args:
        vae: an AutoencoderKL.

    Raises:
        InputError: for another model, for another side than a multiple of four latents (a quarter of a tile overlaps
            the next), a tile larger than the images, and for graphs of open size, which take any.
    """
    if type(vae).__name__ != "AutoencoderKL":
        kind = "no VAE" if vae is None else f"a {type(vae).__name__}, which does not work by tiles"
        raise InputError(f"--vae-tile: the model has {kind}: leave it out")
    scale = latent_scale(vae.config)
    if settings.dynamic_size:
        raise InputError("--vae-tile: a VAE of open size takes tiles of any size: leave it out")
    height, width = (scale * latents for latents in latent_size(call.arguments))
    if side % (4 * scale) or side > min(height, width):
        raise InputError(
            f"--vae-tile: a tile of images of {height} x {width} is a multiple of {4 * scale} pixels and no larger "
            f"than they are, not {side}"
        )
    return Call(0, 0, {"sample": torch.zeros(1, 1, side // scale, side // scale)})


def export_vae(vae: Any, folder: Path, pipeline: Any, call: Call, settings: ExportSettings) -> Path:
    """Export a half of an autoencoder, as the folder's name ends, for the sizes of a denoiser call.

    Gives the path of `model.onnx`.

    Raises:
        InputError: for a path or pattern of the VAE in `keep_fp32` that no module has.
    """
    scale, name = latent_scale(vae.config), f"vae_{folder.name.rpartition('_')[2]}"
    height, width = latent_size(call.arguments)
    if name == "vae_decoder":
        inside, outside, step = "latent_sample", "sample", 1
        channels = vae.config.get("vq_embed_dim") or vae.config.latent_channels
        example = torch.randn(2, channels, height, width)
    else:
        draws = hasattr(vae, "quant_conv") and type(vae).__name__ != "VQModel"
        inside, outside, step = "sample", "latent_parameters" if draws else "latent_sample", scale
        high, wide = (side * scale // enlarges(pipeline) for side in (height, width))
        example = torch.randn(2, vae.config.in_channels, high, wide)
    opened: dict[int, Any] = {0: "batch"}
    if settings.dynamic_size:
        example = in_steps(example, step)
        opened |= open_size(step)
    half = is_half(vae, settings)
    dtype = dtype_of(settings) if half else torch.float32
    module = half_in_precision(name, vae, settings)
    file = export_module(module, {inside: example.to(dtype)}, [outside], folder, settings, {inside: opened}, "vae.")
    # What overflows is fp32 inside the graph: diffusers' pipelines, which would cast all of the VAE, are to leave it.
    write_config(vae, folder, **({"force_upcast": False} if half and vae.config.get("force_upcast") else {}))
    return file


def half_in_precision(name: str, vae: nn.Module, settings: ExportSettings) -> nn.Module:
    """A half of a VAE as it is exported: in half precision, where `is_half` says so, but for what is kept in fp32."""
    module: Any = HALVES[name](vae)
    if not is_half(vae, settings):
        return in_precision(module, torch.float32)
    dtype, kept = dtype_of(settings), paths_to_keep(module, paths_of_vae(settings))
    module = in_precision(module, dtype, kept)
    first = "vae.decoder.up_blocks.0"
    if any(path.startswith(f"{first}.") for path in kept):
        # diffusers casts what enters the blocks to the dtype of their first weight, and it may be one that is kept.
        down = partial(cast_tensor, torch.float32, dtype)
        block = module.get_submodule(first)
        block.register_forward_pre_hook(lambda _module, inputs: map_tensors(down, inputs))
    return module

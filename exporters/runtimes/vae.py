"""An autoencoder in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from exporters.layout import read_config
from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session
from exporters.runtimes.tiles import decode_tiles, encode_tiles, smaller
from slimdiff.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class VAE(RuntimeModule):
    """Drop-in for a pipeline's vae: `pipeline.vae = VAE.open("onnx")`.

    Its answers have the graph's dtype, as a module's have that of its weights. The encoder is opened when it is first
    asked: text to image never does. Images larger than a graph of fixed size takes are made by tiles of that size.

    Args:
        decoder: `latent_sample [B, C, h, w]` -> `sample [B, 3, H, W]`.
        open_encoder: opens a session with `sample [B, 3, H, W]` -> `latent_parameters [B, 2 C, h, w]`, or
            `latent_sample [B, C, h, w]`; None where there is none.

    Raises:
        InputError: if the decoder is none.
    """

    tensor = "latent_sample"

    def __init__(self, decoder: Session, open_encoder: Callable[[], Session] | None, config: dict[str, Any]):
        if set(decoder.inputs) != {"latent_sample"}:
            raise InputError(f"{decoder.source} is no VAE's decoder: its inputs are {', '.join(decoder.inputs)}")
        super().__init__(decoder, FrozenDict(config))
        self._open_encoder = open_encoder
        self.use_slicing = self.use_tiling = False

    def enable_slicing(self) -> None:
        """Decode image by image, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Decode all images at once."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Decode and encode large images by tiles, for less memory: see `exporters.runtimes.tiles`."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Decode and encode an image at once."""
        self.use_tiling = False

    @classmethod
    def open(cls, path: Path | str, runtime: str = "onnxruntime", threads: int | None = None) -> Self:
        """Open `vae_decoder` and `vae_encoder` of a pipeline's folder; see `open_in`."""
        return cls.open_in(Path(path), "vae", runtime, threads)

    @classmethod
    def open_in(cls, folder: Path, name: str, runtime: str, threads: int | None = None) -> Self:
        """Open the two halves of an autoencoder of that name.

        Raises:
            InputError: if there is no decoder of ours.
            MissingPackageError: if the runtime is not here; see `open_session`.
        """
        decoder, encoder = folder / f"{name}_decoder", folder / f"{name}_encoder"
        open_encoder = partial(open_session, encoder, runtime, threads) if encoder.is_dir() else None
        return cls(open_session(decoder, runtime, threads), open_encoder, read_config(decoder))

    def session_of(self, name: str) -> Session | None:
        """The session of `vae_decoder` or `vae_encoder`; None if that is not there."""
        return self.session if name == "vae_decoder" else self._open_encoder and self.encoder

    @cached_property
    def encoder(self) -> Session:
        """The encoder's session."""
        if self._open_encoder is None:
            raise InputError(
                f"{Path(self.session.source).parents[1]} has the VAE's decoder alone, and starting from an image takes "
                "its encoder: bundle it for a server, or name the folder that it was exported to"
            )
        session = self._open_encoder()
        if not {"latent_parameters", "latent_sample"} & set(session.outputs):
            raise InputError(f"{session.source} is no VAE's encoder: it gives {', '.join(session.outputs)}")
        return session

    @property
    def post_quant_conv(self) -> Self:
        """Whose parameters' dtype diffusers takes for that of the decoder."""
        return self

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """The distribution of latents of images `[B, 3, H, W]` in [-1, 1]; of AutoencoderTiny the latents themselves.

        Raises:
            InputError: for a shape that the encoder was not exported for, or an encoder of another kind.
        """
        found = self._run(self.encoder, x, "sample", encode_tiles)
        if "latent_sample" in self.encoder.outputs:
            if self.config.get("_class_name") == "AutoencoderDC":
                return EncoderOutput(latent=found) if return_dict else (found,)
            return AutoencoderTinyOutput(latents=found) if return_dict else (found,)
        found = DiagonalGaussianDistribution(found)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`; `generator` is not used, as in AutoencoderKL.

        Raises:
            InputError: for a shape that the decoder was not exported for, and where it overflows.
        """
        image = self._run(self.session, z, "latent_sample", decode_tiles)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _run(self, session: Session, tensor: Tensor, name: str, by_tiles: Callable[..., Tensor]) -> Tensor:
        """The answer to a batch: by tiles, and sample by sample where that was asked for."""

        def run(some: Tensor) -> Tensor:
            return next(iter(answer(session, {name: some}).values()))

        takes = session.inputs[name]
        if self.use_tiling or smaller(takes, tensor):
            run = partial(by_tiles, run, takes, self.config)
        found = torch.cat([run(some) for some in (tensor.split(1) if self.use_slicing else (tensor,))])
        if tensor.isfinite().all() and not found.isfinite().all():
            raise InputError(
                f"{session.source} overflows: its answer is not finite. slimdiff validate MODEL against this artifact "
                "names the module to keep in fp32 when it is exported (--keep-fp32); --keep-fp32 vae keeps all of it"
            )
        return found.to(tensor.device)

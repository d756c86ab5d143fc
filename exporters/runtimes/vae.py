"""An AutoencoderKL in another runtime, in the place of a pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from exporters.layout import read_config
from exporters.runtimes.module import RuntimeModule, answer
from exporters.runtimes.opening import open_session
from exporters.runtimes.session import Session
from slimdiff.errors import InputError


class VAE(RuntimeModule):
    """Drop-in for a pipeline's vae: `pipeline.vae = VAE.open("onnx")`.

    Its answers have the graph's dtype, as a module's have that of its weights. The encoder is opened when it is first
    asked: text to image never does.

    Args:
        decoder: `latent_sample [B, C, h, w]` -> `sample [B, 3, H, W]`.
        open_encoder: opens a session with `sample [B, 3, H, W]` -> `latent_parameters [B, 2 C, h, w]`.

    Raises:
        InputError: if the decoder is none.
    """

    tensor = "latent_sample"

    def __init__(self, decoder: Session, open_encoder: Callable[[], Session], config: dict[str, Any]):
        if set(decoder.inputs) != {"latent_sample"}:
            raise InputError(f"{decoder.source} is no VAE's decoder: its inputs are {', '.join(decoder.inputs)}")
        super().__init__(decoder, FrozenDict(config))
        self._open_encoder = open_encoder
        self.use_slicing = False

    def enable_slicing(self) -> None:
        """Decode image by image, for less memory."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Decode all images at once."""
        self.use_slicing = False

    @classmethod
    def open(cls, path: Path | str, runtime: str = "onnxruntime", threads: int | None = None) -> VAE:
        """Open `vae_decoder` and `vae_encoder` of a pipeline's folder.

        Raises:
            InputError: if there is no decoder of ours.
            MissingPackageError: if the runtime is not here; see `open_session`.
        """
        decoder, encoder = Path(path) / "vae_decoder", Path(path) / "vae_encoder"
        opened = open_session(decoder, runtime, threads)

        def open_encoder() -> Session:
            if not encoder.is_dir():
                raise InputError(
                    f"{path} has the VAE's decoder alone, and starting from an image takes its encoder: bundle it for "
                    "a server, or name the folder that it was exported to"
                )
            return open_session(encoder, runtime, threads)

        return cls(opened, open_encoder, read_config(decoder))

    @cached_property
    def encoder(self) -> Session:
        """The encoder's session."""
        session = self._open_encoder()
        if "latent_parameters" not in session.outputs:
            raise InputError(
                f"{session.source} gives {', '.join(session.outputs)}, and an AutoencoderKL's encoder latent_parameters"
            )
        return session

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of latents of images `[B, 3, H, W]` in [-1, 1].

        Raises:
            InputError: for a shape that the encoder was not exported for.
        """
        parameters = answer(self.encoder, {"sample": x})["latent_parameters"].to(x.device)
        found = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, C, h, w]`; `generator` is not used, as in AutoencoderKL.

        Raises:
            InputError: for a shape that the decoder was not exported for.
        """
        some = z.split(1) if self.use_slicing else (z,)
        image = torch.cat([answer(self.session, {"latent_sample": one})["sample"] for one in some]).to(z.device)
        return DecoderOutput(sample=image) if return_dict else (image,)

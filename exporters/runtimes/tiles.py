"""Large images by tiles, as diffusers' AutoencoderKL does it, with a graph in the place of its halves.

A graph of open size takes the tiles that the model in torch would: their side is the `sample_size` of its config, and
the last ones are smaller. A graph of fixed size takes tiles of its own size alone. So the last ones begin earlier, and
what of their answer is left of (or above) the smaller tile is cut off: the cut that diffusers asked for, seen with more
around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from exporters.layout import latent_scale
from exporters.runtimes.session import Shape
from slimdiff.errors import InputError

Run = Callable[[Any], Tensor]
log = logging.getLogger("slimdiff")


def enable_tiling(pipeline: Any) -> None:
    """Let a pipeline's VAE, in torch or in another runtime, decode and encode large images by tiles.

    Raises:
        InputError: if it has no VAE that does.
    """
    vae: Any = getattr(pipeline, "vae", None)
    try:
        vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        kind = "no VAE" if vae is None else f"a {type(vae).__name__}, which does not work by tiles"
        raise InputError(f"{type(pipeline).__name__} has {kind}: leave out --tiled") from error
    session = vars(vae).get("session")
    if session is not None and all(isinstance(size, int) for size in session.inputs["latent_sample"][2:]):
        log.warning("--tiled changes nothing: %s is of fixed size; export with --vae-tile, or open", session.source)
    if isinstance(vae, AutoencoderKL):
        vae.tile_latent_min_size = tile_side(vae.config)
        vae.tile_sample_min_size = vae.tile_latent_min_size * latent_scale(vae.config)


def smaller(takes: Shape, whole: Tensor) -> bool:
    """Whether a graph of fixed size takes less than this, so that it can have it by tiles alone."""
    sides = takes[2:]
    fits = all(isinstance(n, int) and n <= side for n, side in zip(sides, whole.shape[2:], strict=True))
    return fits and sides != tuple(whole.shape[2:])


def decode_tiles(run: Run, takes: Shape, config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` of latents `[B, C, h, w]`.

    Args:
        run: the decoder's graph, for one tile.
        takes: the shape of its input.
        config: of the AutoencoderKL.

    Raises:
        InputError: if the model's or the graph's sides are too small to be tiles.
    """
    side, scale = tile_side(config), latent_scale(config)
    return _by_tiles(AutoencoderKL.tiled_decode, run, takes, 1, side, scale, latents)


def encode_tiles(run: Run, takes: Shape, config: Mapping[str, Any], images: Tensor) -> Tensor:
    """Latents' parameters `[B, 2 C, h, w]` of images `[B, 3, H, W]`; see `decode_tiles`."""
    side, scale = tile_side(config), latent_scale(config)
    return _by_tiles(AutoencoderKL._tiled_encode, run, takes, scale, side, scale, images)


def tile_side(config: Mapping[str, Any]) -> int:
    """Latents along the side of a tile of an AutoencoderKL, by its config's `sample_size`, a multiple of four.

    A quarter of a tile overlaps the next. With other sides diffusers rounds that to other places in pixels than in
    latents, and gives an image of another size.

    Raises:
        InputError: if that is none, or the config another model's.
    """
    size = config.get("sample_size")
    size = min(size) if isinstance(size, list | tuple) else size
    side = (size if isinstance(size, int) else 0) // latent_scale(config) // 4 * 4
    if not side:
        raise InputError(f"a VAE whose config says sample_size {size} cannot work by tiles: leave out --tiled")
    return side


def _by_tiles(method: Any, run: Run, takes: Shape, unit: int, side: int, scale: int, whole: Tensor) -> Tensor:
    """Args: `unit` is pixels of the graph's input per latent, `side` that of a tile in latents."""
    fixed = [size for size in takes[2:] if isinstance(size, int)]
    if fixed:
        side = min(fixed) // unit // 4 * 4
        if tuple(whole.shape[2:]) == tuple(takes[2:]) or not side or len(fixed) < 2:
            return run(whole)
    elif max(whole.shape[2:]) <= side * unit:
        return run(whole)
    compute = _uncut(run) if fixed else run
    autoencoder = SimpleNamespace(
        decoder=compute,
        encoder=compute,
        tile_latent_min_size=side,
        tile_sample_min_size=side * scale,
        tile_overlap_factor=0.25,
        # Their convolutions are in the graph.
        config=SimpleNamespace(use_quant_conv=False, use_post_quant_conv=False),
        blend_v=lambda *args: AutoencoderKL.blend_v(None, *args),
        blend_h=lambda *args: AutoencoderKL.blend_h(None, *args),
    )
    found = method(autoencoder, _Windows(whole, fixed) if fixed else whole)
    return getattr(found, "sample", found)


class _Windows:
    """A tensor `[B, C, H, W]` that is cut as diffusers does it; every cut comes as one of the graph's size.

    Where it says `whole[:, :, 6:8, 0:8]` and the graph takes 8 x 8, it gets `whole[:, :, 0:8, 0:8]` of a tensor of that
    height, and where in it the cut is.
    """

    def __init__(self, whole: Tensor, size: list[int]):
        self.whole, self.size, self.shape = whole, size, whole.shape

    def __getitem__(self, cut: tuple[slice, ...]) -> tuple[Tensor, list[tuple[int, int]]]:
        window, places = [slice(None)] * 2, []
        for part, length, size in zip(cut[2:], self.shape[2:], self.size, strict=True):
            start = max(0, min(part.start, length - size))
            window.append(slice(start, start + size))
            places.append((part.start - start, min(part.stop, length) - start))
        return self.whole[tuple(window)], places


def _uncut(run: Run) -> Run:
    """What computes a cut of `_Windows`: all of the graph's size, and of the answer the place of the cut."""

    def compute(cut: tuple[Tensor, list[tuple[int, int]]]) -> Tensor:
        tensor, places = cut
        answer = run(tensor)
        for axis, (start, stop) in enumerate(places, 2):
            start, stop = (place * answer.shape[axis] // tensor.shape[axis] for place in (start, stop))
            answer = answer.narrow(axis, start, stop - start)
        return answer

    return compute

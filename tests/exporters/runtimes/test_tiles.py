"""Large images by tiles: a graph of open size does as the model in torch, one of fixed size sees tiles of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, VQModel
from torch import nn

from exporters.runtimes.tiles import decode_tiles, enable_tiling, encode_tiles, tile_side
from slimdiff.errors import InputError

CONFIG = {"sample_size": 32, "block_out_channels": (8, 8)}
OPEN = ("batch", 4, "height", "width")


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("takes", [OPEN, ("batch", 4, 8, 8), ("batch", 4, 16, 12), ("batch", 4, 9, 13)])
@pytest.mark.parametrize("sides", [(33, 40), (16, 100), (17, 13), (16, 16)])
def test_what_looks_at_one_place_alone_makes_the_same_of_tiles_as_of_the_whole(takes, sides):
    """Then nothing can differ but where the tiles lie and how wide they overlap."""
    seen = set()

    def enlarge(tile):
        seen.add(tuple(tile.shape[2:]))
        return nn.functional.interpolate(tile, scale_factor=2, mode="nearest")

    def shrink(tile):
        seen.add(tuple(tile.shape[2:]))
        return tile[:, :, ::2, ::2].clone()

    latents = noise(2, 4, *sides)
    torch.testing.assert_close(decode_tiles(enlarge, takes, CONFIG, latents), enlarge(latents))
    tiles = seen - {sides}
    assert tiles <= ({takes[2:]} if takes != OPEN else {(h, w) for h in range(17) for w in range(17)})
    seen.clear()
    images = noise(1, 3, *(2 * side for side in sides))
    pixels = takes if takes == OPEN else (*takes[:2], *(2 * side for side in takes[2:]))
    torch.testing.assert_close(encode_tiles(shrink, pixels, CONFIG, images), images[:, :, ::2, ::2])


@pytest.fixture(scope="module")
def in_torch(pipeline) -> AutoencoderKL:
    """Its VAE, by tiles of 8 x 8 latents."""
    other = copy.copy(pipeline)
    other.register_modules(vae=copy.deepcopy(pipeline.vae))
    enable_tiling(other)
    assert other.vae.use_tiling and not pipeline.vae.use_tiling
    assert (other.vae.tile_latent_min_size, other.vae.tile_sample_min_size) == (8, 16)
    return other.vae


def opened(folder) -> object:
    pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")
    from exporters.runtimes.vae import VAE

    return VAE.open(folder, threads=1)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_of_open_size_works_by_the_tiles_of_the_model(open_folder, in_torch):
    vae = opened(open_folder)
    latents, images = noise(2, 4, 19, 12), noise(1, 3, 38, 24)
    whole = vae.decode(latents).sample
    vae.enable_tiling()
    found = vae.decode(latents).sample
    torch.testing.assert_close(found, in_torch.decode(latents).sample, rtol=1e-4, atol=1e-4)
    assert (found - whole).abs().max() > 1e-3  # a tile sees nothing of what is around it
    expected = in_torch.encode(images).latent_dist.parameters
    torch.testing.assert_close(vae.encode(images).latent_dist.parameters, expected, rtol=1e-4, atol=1e-4)
    vae.enable_slicing()
    torch.testing.assert_close(vae.decode(latents).sample, found, rtol=1e-4, atol=1e-4)
    vae.disable_tiling()
    torch.testing.assert_close(vae.decode(latents).sample, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_graph_of_fixed_size_takes_larger_latents_by_tiles_of_its_size(onnx_folder, pipeline):
    vae = opened(onnx_folder)
    latents = noise(1, 4, 19, 12)
    found = vae.decode(latents).sample
    assert found.shape == (1, 3, 38, 24)

    # What is one tile's alone: they begin at 0, 6, 12 and 18 and at 0 and 6; the last ones see the 8 up to the edge.
    for rows, columns, (top, left) in (
        (slice(0, 12), slice(0, 12), (0, 0)),
        (slice(0, 12), slice(16, 24), (0, 4)),
        (slice(28, 38), slice(16, 24), (11, 4)),
    ):
        place = (..., slice(rows.start - 2 * top, rows.stop - 2 * top), slice(columns.start - 2 * left, 16))
        tile = pipeline.vae.decode(latents[:, :, top : top + 8, left : left + 8]).sample
        part = found[..., rows, columns]
        torch.testing.assert_close(part, tile[place][..., : part.shape[-1]], rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"latent_sample has shape \(1, 4, 7, 12\)"):
        vae.decode(latents[:, :, :7])


def test_the_side_of_a_tile_is_a_multiple_of_four_latents():
    blocks = {"block_out_channels": [8] * 4}
    assert [tile_side({"sample_size": n, **blocks}) for n in (512, 520, (768, 512))] == [64, 64, 64]
    for size in (24, None):
        with pytest.raises(InputError, match=f"sample_size {size} cannot work by tiles"):
            tile_side({"sample_size": size, **blocks})


def test_what_has_no_vae_that_works_by_tiles_is_refused(fresh):
    with pytest.raises(InputError, match="has no VAE: leave out --tiled"):
        enable_tiling(DDPMPipeline(unet=None, scheduler=None))
    fresh.vae = VQModel(block_out_channels=(8,), norm_num_groups=8)
    with pytest.raises(InputError, match="has a VQModel, which does not work by tiles"):
        enable_tiling(fresh)


@pytest.fixture
def fresh(pipeline):
    return copy.copy(pipeline)

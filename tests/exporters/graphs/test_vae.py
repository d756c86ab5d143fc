"""What of a VAE a half-precision export keeps in fp32: by path, by pattern, or all of it."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from exporters.graphs.precision import paths_to_keep
from exporters.graphs.vae import HALVES, half_in_precision, is_half, settings_for_unet, tile_call
from exporters.settings import ExportSettings
from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError

PATTERNS = (
    ["vae.decoder.*", "vae.encoder.*"],
    ["vae.decoder.up_blocks", "vae.encoder.down_blocks"],
    ["vae.*.norm1"],
    ["vae.decoder.up_blocks.0.resnets.0.norm1"],
    ["vae.*.to_q", "vae.post_quant_conv"],
    ["vae.decoder.mid_block", "vae.decoder.conv_norm_out", "vae.encoder"],
)


def fp16(*keep: str) -> ExportSettings:
    return ExportSettings(precision="fp16", keep_fp32=list(keep))


def floats_of(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: weight.dtype for name, weight in module.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("keep", PATTERNS)
@pytest.mark.parametrize("name", HALVES)
def test_whatever_is_kept_the_half_computes_as_the_vae_does(pipeline, name, keep):
    """In torch, where tensors of two dtypes that meet are an error."""
    vae, generator = pipeline.vae, torch.Generator().manual_seed(0)
    given = torch.randn((1, 4, 8, 8) if name == "vae_decoder" else (1, 3, 16, 16), generator=generator)
    (expected,) = HALVES[name](vae)(given)
    module = half_in_precision(name, vae, fp16(*keep))
    (found,) = module(given.half())
    assert found.dtype == torch.float16 and set(floats_of(vae).values()) == {torch.float32}
    assert (found.float() - expected).norm() < 5e-3 * expected.norm()
    kept = paths_to_keep(module, keep)
    wide = {n for n, dtype in floats_of(module).items() if dtype == torch.float32}
    assert wide == {n for n in floats_of(module) if n.startswith(tuple(f"{path}." for path in kept))} != set()


def test_which_vaes_are_half(fresh_vae):
    for upcast, keep, half in (
        (True, [], False),
        (True, ["vae.decoder.up_blocks.1"], True),
        (True, ["*.attn1"], False),
        (True, ["vae"], False),
        (False, [], True),
        (False, ["vae"], False),
        (False, ["vae", "vae.decoder"], False),
    ):
        fresh_vae.register_to_config(force_upcast=upcast)
        assert is_half(fresh_vae, fp16(*keep)) is half
        assert not is_half(fresh_vae, ExportSettings(keep_fp32=keep))


@pytest.fixture
def fresh_vae(pipeline):
    return type(pipeline.vae).from_config(dict(pipeline.vae.config))


def test_paths_of_both_are_checked_before_either_is_exported(pipeline):
    unet, vae = pipeline.unet, pipeline.vae
    left = settings_for_unet(unet, vae, fp16("vae.decoder.*", "*.attn1", "vae"))
    assert left.keep_fp32 == ["*.attn1"] and left.precision == "fp16"
    for pattern in ("vae.decoder.up_blocks.9", "vae.*.attn1", "*.attn9", "decoder.mid_block", "vaes.decoder"):
        with pytest.raises(InputError, match=f"keep_fp32: no module matches '{pattern.replace('*', '[*]')}'"):
            settings_for_unet(unet, vae, fp16("vae.decoder", "*.attn1", pattern))
    with pytest.raises(InputError, match="no module matches 'vae.decoder'"):  # a UNet alone
        settings_for_unet(unet, None, fp16("*.attn1", "vae.decoder"))


def test_a_tile_is_of_whole_steps_and_no_larger_than_the_image():
    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(3, 3, *blocks, block_out_channels=(4,) * 4, norm_num_groups=4)
    call = Call(0, 981, {"sample": torch.zeros(2, 4, 32, 64)})
    assert tile_call(call, 64, vae, fp16()).arguments["sample"].shape[2:] == (8, 8)
    for side in (60, 8, 288):
        with pytest.raises(InputError, match=f"a tile of images of 256 x 512 is a multiple of 32 .*, not {side}"):
            tile_call(call, side, vae, fp16())
    with pytest.raises(InputError, match="open size"):
        tile_call(call, 64, vae, ExportSettings(dynamic_size=True))
    for other, message in ((None, "has no VAE"), (nn.Identity(), "a Identity, which does not work by tiles")):
        with pytest.raises(InputError, match=message):
            tile_call(call, 64, other, fp16())

"""Transformers that make images."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed

from families.family import SAMPLING, Family, attention_and, noise, quiet, tiny_vae
from slimdiff.denoising.trajectory import Call


def dit() -> DiTPipeline:
    """Attention with biases, GELU feed-forwards, classes by adaptive norms."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, norm_num_groups=8, out_channels=8
    )
    return quiet(DiTPipeline(transformer.eval(), tiny_vae(), DDIMScheduler()))


def pixart() -> PixArtAlphaPipeline:
    """With embeddings in the place of T5, which has no small version."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=24,
        norm_num_groups=8,
    )
    # A new adaptive norm's table is small noise, the output's is too: as it is.
    return quiet(PixArtAlphaPipeline(None, None, tiny_vae(), transformer.eval(), DDIMScheduler()))


def text_embeddings(seed: int) -> dict[str, torch.Tensor]:
    mask = torch.tensor([1, 1, 1, 1, 1, 0, 0])
    return {
        "prompt_embeds": noise(7, 24, seed=seed),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(7, 24, seed=99),
        "negative_prompt_attention_mask": mask,
    }


def hunyuan() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
    ).eval()


def hunyuan_calls() -> list[Call]:
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 4, 8, 8, seed=step),
                "timestep": torch.tensor([t, t]).float(),  # as its pipeline does: in the dtype of the latents
                "encoder_hidden_states": noise(2, 5, 32, seed=7),
                "text_embedding_mask": torch.ones(2, 5),
                "encoder_hidden_states_t5": noise(2, 6, 24, seed=8),
                "text_embedding_mask_t5": torch.ones(2, 6),
                "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0]] * 2),
                "style": torch.zeros(2, dtype=torch.long),
                "image_rotary_emb": rotary,
            },
        )
        for step, t in enumerate((900, 300))
    ]


def sd3() -> SD3Transformer2DModel:
    """Joint attention over image and text; the second block has an image-only attention beside it."""
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def sd3_calls() -> list[Call]:
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 4, 8, 8, seed=step),
                "timestep": torch.tensor([t, t]),
                "encoder_hidden_states": noise(2, 5, 24, seed=7),
                "pooled_projections": noise(2, 16, seed=8),
            },
        )
        for step, t in enumerate((900.5, 300.25))
    ]


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux_calls() -> list[Call]:
    return [
        Call(
            step,
            t,
            {
                "hidden_states": noise(2, 16, 4, seed=step),
                "timestep": torch.tensor([t, t]),
                "encoder_hidden_states": noise(2, 5, 24, seed=7),
                "pooled_projections": noise(2, 16, seed=8),
                "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
                "txt_ids": torch.zeros(5, 3),
            },
        )
        for step, t in enumerate((0.9, 0.3))
    ]


ALONE = "values alone are slimmed: "

TRANSFORMERS: dict[str, Family] = {
    "dit": Family(dit, [{"class_labels": 3}, {"class_labels": 5}], attention_and(2, 2)),
    "pixart": Family(
        pixart,
        [text_embeddings(0), text_embeddings(1)],
        attention_and(2),
        sampling=SAMPLING.model_copy(
            update={"arguments": {"negative_prompt": None, "use_resolution_binning": False}, "height": 16, "width": 16}
        ),
    ),
    "hunyuan": Family(
        hunyuan,
        [],
        {"feed_forward": 2, "values": 4},
        {f"{ALONE}queries and keys are normalised (qk-norm); rotary positions turn queries and keys": 4},
        calls=hunyuan_calls,
    ),
    "sd3": Family(
        sd3,
        [],
        {"feed_forward": 3, "values": 3},
        {
            f"{ALONE}added key and value projections; queries and keys are normalised (qk-norm)": 2,
            f"{ALONE}queries and keys are normalised (qk-norm)": 1,
        },
        calls=sd3_calls,
    ),
    "flux": Family(
        flux,
        [],
        {"feed_forward": 3, "values": 1},
        {
            f"{alone}FluxAttention is an attention class of its own; {added}queries and keys are normalised (qk-norm); "
            "rotary positions turn queries and keys": 1
            for alone, added in ((ALONE, "added key and value projections; "), ("", ""))
        },
        calls=flux_calls,
    ),
}

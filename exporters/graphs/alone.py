"""A call of a UNet without its pipeline, as its configuration says."""

from __future__ import annotations

from typing import Any

import torch

from slimdiff.denoising.trajectory import Call
from slimdiff.errors import InputError
from slimdiff.settings import Sampling

_TOKENS = 77
"""Of CLIP's prompts."""
_TIME_IDS = 6
"""Of SDXL: sizes and places; its refiner has a score in the place of the last two."""


def check_alone(kind: str) -> None:
    """Refuse a denoiser, by the name of its class, whose call its configuration alone does not say.

    Raises:
        InputError: for a transformer.
    """
    kind = kind.removeprefix("Slim")
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise InputError(f"a {kind} alone does not say what it is called with: name its pipeline (--pipeline MODEL)")


def call_of_unet(unet: Any, *, batch: int | None = None, guidance: float = Sampling().guidance) -> Call:
    """A call with the shapes that a UNet2DConditionModel or UNet2DModel has by itself: zeros, at a whole time.

    Args:
        batch: samples in it; if not given, as many as one image takes at that guidance.

    Raises:
        InputError: for another model, or one that takes what its configuration alone does not say.
    """
    config, kind = unet.config, type(unet).__name__.removeprefix("Slim")
    check_alone(kind)
    guided = kind == "UNet2DConditionModel" and not config.get("time_cond_proj_dim") and guidance > 1
    batch = batch or (2 if guided else 1)
    side = config["sample_size"]
    sides = [side, side] if isinstance(side, int) else list(side or ())
    arguments: dict[str, Any] = {
        "sample": torch.zeros(batch, config["in_channels"], *sides),
        "timestep": torch.tensor(1),
    }
    if kind == "UNet2DConditionModel":
        widths = config["cross_attention_dim"]
        width = config.get("encoder_hid_dim") or (widths if isinstance(widths, int) else widths[0])
        arguments["encoder_hidden_states"] = torch.zeros(batch, _TOKENS, width)
    if config.get("time_cond_proj_dim"):
        arguments["timestep_cond"] = torch.zeros(batch, config["time_cond_proj_dim"])
    if config.get("num_class_embeds") and config.get("class_embed_type") is None:
        arguments["class_labels"] = torch.zeros(batch, dtype=torch.long)
    if config.get("addition_embed_type") == "text_time":
        whole, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        # The refiner has one text encoder, whose embedding is as wide as its tokens'.
        ids = _TIME_IDS - 1 if whole - each * (_TIME_IDS - 1) == config["cross_attention_dim"] else _TIME_IDS
        texts = torch.zeros(batch, whole - each * ids)
        arguments["added_cond_kwargs"] = {"text_embeds": texts, "time_ids": torch.zeros(batch, ids)}
    unsaid = [
        f"{name} {config[name]}"
        for name, known in (
            ("encoder_hid_dim_type", (None, "text_proj")),
            ("addition_embed_type", (None, "text_time")),
            ("class_embed_type", (None,)),
        )
        if config.get(name) not in known
    ]
    if unsaid or len(sides) != 2:
        what = ", ".join(unsaid) or "no sample_size"
        raise InputError(
            f"a UNet with {what} does not say what it is called with: name its pipeline (--pipeline MODEL)"
        )
    return Call(0, 1, arguments, unet.dtype)

"""What one safetensors file of a whole model is, by its header alone: neither tensors nor torch are loaded.

Taken is the layout that Stable Diffusion was published in (LDM's and SGM's): 1.x, 2.x and XL (base and refiner), and
their UNets for inpainting and InstructPix2Pix. The sizes of every component follow from the shapes of the file's
tensors, and what shapes do not say lies in `layouts/`, so nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from slimdiff.errors import InputError

DATA = Path(__file__).parent / "layouts"
UNET = "model.diffusion_model."
VAE = "first_stage_model."
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_OPEN_CLIP = "cond_stage_model.model."
"""Stable Diffusion 2's text encoder."""
_GROUPS = 32
"""Of every group norm in these layouts."""
CLIP_WORDS = 49408
UNUSED = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema|decoder_ema|encoder_ema)\..*|.*\.position_ids|.*\.attn_mask"
    r"|.*\.logit_scale|denoiser\.(log_)?sigmas|global_step|v_pred|ztsnr"
    r"|(model\.)?(betas|alphas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod|logvar"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights|scale_factor|sigmas)"
    r"|cond_stage_model\.(model|transformer)\.text_projection(\.weight)?|conditioner\.embedders\.0\.transformer\."
    r"text_projection(\.weight)?"
)
"""Tensors that are of no use: averages kept for training, losses, schedules (which the scheduler computes)."""
WHOLE = "name a safetensors file of the whole model (UNet, VAE and text encoders), or a diffusers pipeline directory"
_OTHERS = (
    (
        r"lora_\w+\.|.*\.(lora_[AB]|lora_up|lora_down|lora\.(up|down)|hada_w1_a|lokr_w1)\b",
        "a LoRA, which changes a model",
    ),
    (r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.|.*\.zero_convs\.", "a ControlNet"),
    (r"emb_params$|clip_[lg]$|string_to_param", "a textual inversion, which is no model"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "Flux's transformer"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3's transformer"),
    (r"edm_mean$", "Playground 2.5"),
    (r"(encoder|decoder)\.(down_blocks|up_blocks)\.", "a VAE alone, of diffusers"),
    (r"(down_blocks|up_blocks|mid_block)\.", "a denoiser alone, of diffusers"),
    (r"(encoder|decoder)\.(down|up|mid)\.", "a VAE alone"),
    (r"(input_blocks|output_blocks|middle_block)\.", "a UNet alone"),
    (r"transformer_blocks\.", "a transformer alone, of diffusers"),
    (r"(text_model\.|transformer\.resblocks\.|encoder\.block\.)", "a text encoder alone"),
)
"""What else a safetensors file may be, by the beginnings of names in it; the first that fits is said."""


@dataclass
class Header:
    """What a safetensors file says before its tensors.

    Attributes:
        shapes: by the tensors' names.
        dtypes: as safetensors names them.
        metadata: texts that whoever wrote the file noted.
    """

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def is_statistics(self) -> bool:
        """Whether `Statistics.save` wrote it."""
        return '"model_hash"' in self.metadata.get("slimdiff", "")

    def refuse(self, reason: str) -> InputError:
        """An error about the file."""
        return InputError(f"{self.file} {reason}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        if name not in self.shapes:
            raise self.refuse(f"is no whole model: it has no {name}; copy it again, or {WHOLE}")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        """How many numbers there are in the place of `#` in the beginnings of names; they must run from 0."""
        found = {int(m[1]) for n in self.shapes if (m := re.match(re.escape(pattern).replace(r"\#", r"(\d+)"), n))}
        if found != set(range(len(found))):
            raise self.refuse(f"is no whole model: some of {pattern.replace('#', '*')} are absent; copy it again")
        return len(found)


def is_weights_file(path: Path) -> bool:
    """Whether a safetensors file is no statistics of ours; true of one that is not sound, to be refused as a model."""
    with suppress(InputError):
        return not read_header(path).is_statistics
    return True


def read_header(file: Path) -> Header:
    """What a safetensors file says of its tensors; none of them is read, and torch is not loaded.

    Raises:
        InputError: if it is a pickle, or no whole safetensors file.
    """
    if file.suffix in PICKLES:
        raise InputError(f"{file} is a pickle ({file.suffix}), which can run code when opened: refused; {WHOLE}")
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is a file, and no safetensors one: {WHOLE}")
    tensors, metadata = header_of(file)
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return Header(file, shapes, {name: dtype for name, (dtype, _) in tensors.items()}, metadata)


def header_of(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Name of each tensor -> its dtype, as safetensors names it, and its shape; and the file's metadata.

    Raises:
        InputError: for a file whose header is not sound, or that its tensors do not fill.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            tensors = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()}
            return tensors, dict(opened.metadata() or {})
    except Exception as error:  # safetensors has an exception of its own, below Exception alone
        raise InputError(f"{file} is not a whole safetensors file ({error}): copy it again") from error


@cache
def layout_table(name: str) -> dict[str, Any]:
    return dict(json.loads((DATA / name).read_text(encoding="utf-8")))


def check_single_file(file: Path) -> tuple[Header, dict[str, Any], dict[str, dict[str, Any]]]:
    """The file's header, its layout (see `layouts/layouts.json`), and the configuration of each component.

    Raises:
        InputError: saying what the file is if it is no model of a known layout, and what would be right.
    """
    header = read_header(file)
    layout = _find_layout(header)
    known = (UNET, VAE, *(text["prefix"] for text in layout["text_encoders"]))
    unknown = [name for name in header.shapes if not name.startswith(known) and not UNUSED.fullmatch(name)]
    if unknown:
        raise header.refuse(f"holds {listed(unknown)}, of no part of {layout['title']}: {WHOLE}")
    channels = header.shape(UNET + "input_blocks.0.0.weight")[1]
    if str(channels) not in layout["pipelines"]:
        what = {5: "depth to image", 7: "upscaling"}.get(channels, "another task")
        counts = ", ".join(layout["pipelines"])
        raise header.refuse(
            f"has a UNet for {what}, of {channels} input channels: of {layout['title']} those of {counts} are read "
            "from one file; name a diffusers pipeline directory"
        )
    configs = {f"text_encoder{text['suffix']}": text_config(header, text) for text in layout["text_encoders"]}
    configs["vae"] = _vae_config(header, layout)
    configs["unet"] = _unet_config(header, layout, configs)
    return header, layout, configs


def _find_layout(header: Header) -> dict[str, Any]:
    """The layout by the prefixes of names; refused is what has not all parts of one."""
    names = header.shapes
    if header.is_statistics:
        raise header.refuse(f"is statistics of slimdiff, and no model: {WHOLE}")
    what = next((what for mark, what in _OTHERS if any(re.match(mark, name) for name in names)), None)
    if what is not None:
        raise header.refuse(f"is {what}: {WHOLE}" + (", and give this with --lora" if "LoRA" in what else ""))
    starts = {"UNet": [UNET], "VAE": [VAE], "text encoder": ["cond_stage_model.", "conditioner.embedders."]}
    there = [part for part, marks in starts.items() if any(name.startswith(tuple(marks)) for name in names)]
    if not there:
        raise header.refuse(f"is no model of a known layout (Stable Diffusion 1.x, 2.x or XL): {WHOLE}")
    if len(there) < len(starts):
        lacks = " and no ".join(part for part in starts if part not in there)
        raise header.refuse(f"is no whole model: it has a {' and a '.join(there)}, and no {lacks}; {WHOLE}")
    for layout in layout_table("layouts.json").values():
        if all(any(name.startswith(text["prefix"]) for name in names) for text in layout["text_encoders"]):
            return dict(layout)
    raise header.refuse(f"has text encoders of no known layout (Stable Diffusion 1.x, 2.x or XL): {WHOLE}")


def listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def text_config(header: Header, text: dict[str, Any]) -> dict[str, Any]:
    """Of a CLIP text encoder: heads have 64 channels in all of them."""
    prefix = text["prefix"]
    inner = prefix + "text_model." if any(name.startswith(prefix + "text_model.") for name in header.shapes) else prefix
    of_open_clip = prefix.endswith(".model.")
    layers = inner + ("transformer.resblocks." if of_open_clip else "encoder.layers.")
    words, width = header.shape(inner + ("" if of_open_clip else "embeddings.") + "token_embedding.weight")
    positions = "positional_embedding" if of_open_clip else "embeddings.position_embedding.weight"
    count = header.count(layers + "#.")
    if prefix == _OPEN_CLIP:  # SD 2 reads what its next to last layer says; files of diffusers have no last one
        count = 23 if width == 1024 else count - 1
    if words < CLIP_WORDS:
        raise header.refuse(f"has a text encoder of {words} words, and CLIP's vocabulary has {CLIP_WORDS}: {WHOLE}")
    _check_multiple(header, "the text encoder", width, 64)
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": header.shape(f"{layers}0.mlp.{'c_fc' if of_open_clip else 'fc1'}.weight")[0],
        "num_hidden_layers": count,
        "num_attention_heads": width // 64,
        "max_position_embeddings": header.shape(inner + positions)[0],
        "projection_dim": header.shapes.get(prefix + "text_projection", (width, width))[1],
        "hidden_act": text["hidden_act"],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in the published models; transformers then looks for the largest number of a word
        "pad_token_id": 1,
    }


def _check_multiple(header: Header, what: str, width: int, unit: int) -> None:
    if width % unit:
        raise header.refuse(f"has {width} channels in {what}, where this layout has multiples of {unit}: {WHOLE}")


def _vae_config(header: Header, layout: dict[str, Any]) -> dict[str, Any]:
    encoder = VAE + "encoder."
    levels = header.count(encoder + "down.#.")
    channels = [header.shape(f"{encoder}down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    for width in channels:
        _check_multiple(header, "the VAE", width, _GROUPS)
    return {
        "in_channels": header.shape(encoder + "conv_in.weight")[1],
        "out_channels": header.shape(VAE + "decoder.conv_out.weight")[0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": header.count(encoder + "down.0.block.#."),
        "latent_channels": header.shape(encoder + "conv_out.weight")[0] // 2,
        "norm_num_groups": _GROUPS,
        "sample_size": layout["pixels"],
        "scaling_factor": layout["scaling_factor"],
    }


def _unet_config(header: Header, layout: dict[str, Any], others: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a UNet whose levels end where `input_blocks` have a downsampler (`op`)."""
    levels: list[list[tuple[int, int]]] = [[]]  # channels of each block, and the depth of its transformer
    attention = ""
    for index in range(1, header.count(UNET + "input_blocks.#.")):
        block = f"{UNET}input_blocks.{index}."
        if block + "0.op.weight" in header.shapes:
            levels.append([])
        else:
            depth = header.count(block + "1.transformer_blocks.#.")
            levels[-1].append((header.shape(block + "0.out_layers.3.weight")[0], depth))
            attention = block + "1." if depth else attention
    middle = header.count(UNET + "middle_block.1.transformer_blocks.#.")
    even = all(level == levels[0][:0] + level[:1] * len(levels[0]) for level in levels) and levels[0]
    if not even or not attention or not middle or levels[-1][0][1] not in (0, middle):
        raise header.refuse(
            f"has a UNet of no known layout: blocks of {levels} (channels, transformer layers), {middle} in the middle"
        )
    channels, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    for width in channels:
        _check_multiple(header, "the UNet", width, max(_GROUPS, layout.get("head_channels", 0)))
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = {
        "in_channels": header.shape(UNET + "input_blocks.0.0.weight")[1],
        "out_channels": header.shape(UNET + "out.2.weight")[0],
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "layers_per_block": len(levels[0]),
        # The last is the middle's too, and others are not looked at where a level has no transformer.
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), middle],
        "cross_attention_dim": header.shape(attention + "transformer_blocks.0.attn2.to_k.weight")[1],
        # diffusers takes the number of heads by this name
        "attention_head_dim": [layout.get("heads") or width // layout["head_channels"] for width in channels],
        "use_linear_projection": len(header.shape(attention + "proj_in.weight")) == 2,
        "norm_num_groups": _GROUPS,
        "sample_size": layout["pixels"] // 8,
    }
    if "time_ids" in layout:
        width = header.shape(UNET + "label_emb.0.0.weight")[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - others["text_encoder_2"]["projection_dim"]) // layout["time_ids"],
            "projection_class_embeddings_input_dim": width,
        }
    return config

"""A pipeline from one safetensors file in Stable Diffusion's original layout (`single_file` says which).

The weights are renamed by diffusers' own functions (`diffusers.loaders.single_file_utils`), and every weight of each
component comes from the file, or it is refused.
"""

from __future__ import annotations

import gzip
import inspect
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as ldm
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel

from slimdiff.denoising.precision import refuse_overflow
from slimdiff.loading.components import plain_name
from slimdiff.loading.single_file import (
    CLIP_WORDS,
    DATA,
    UNET,
    UNUSED,
    VAE,
    WHOLE,
    Header,
    check_single_file,
    layout_table,
    listed,
)
from slimdiff.loading.weights import float_dtypes

log = logging.getLogger("slimdiff")
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_LAST_NORM = re.escape(UNET) + r"output_blocks\.\d+\.1\.transformer_blocks\.0\.norm1\.bias"


def load_single_file(
    file: Path, dtype: torch.dtype | None = None, instead: Mapping[str, Any] | None = None
) -> diffusers.DiffusionPipeline:
    """The pipeline of a file; every weight of each component comes from it, in the dtype that it has there.

    Args:
        dtype: of all its floating-point weights; each keeps its own if not given.
        instead: components that are not read, and what the pipeline has in their place: None of what is not needed.

    Raises:
        InputError: see `check_single_file`; or naming the component, and tensors that are absent, of another shape or
            of no use, or that `dtype` is too narrow for.
    """
    header, layout, configs = check_single_file(file)
    kind, scheduler = layout["pipelines"][str(configs["unet"]["in_channels"])]
    parts: dict[str, Any] = dict(layout["values"])
    instead = instead or {}
    prediction = _prediction(header, layout)
    if prediction == "v_prediction" and "v_prediction_pixels" in layout:
        configs["vae"]["sample_size"] = layout["v_prediction_pixels"]
        configs["unet"] |= {"sample_size": layout["v_prediction_pixels"] // 8, "upcast_attention": True}
    for text in layout["text_encoders"]:
        name, tokenizer = (part + text["suffix"] for part in ("text_encoder", "tokenizer"))
        config = configs[name]
        if name not in instead:
            past = f"{text['prefix']}transformer.resblocks.{config['num_hidden_layers']}."  # SD 2's last layer
            tensors = _read(header, text["prefix"], dtype, past)
            parts[name] = _fill(header, name, getattr(transformers, text["class"]), config, tensors, text["prefix"])
        if tokenizer not in instead:
            parts[tokenizer] = make_tokenizer(text["pad_token"], config["max_position_embeddings"])
    if "vae" not in instead:
        vae = _read(header, VAE, dtype)
        parts["vae"] = _fill(header, "vae", diffusers.AutoencoderKL, configs["vae"], vae, VAE)
    if "unet" not in instead:
        unet = _read(header, UNET, dtype)
        parts["unet"] = _fill(header, "unet", diffusers.UNet2DConditionModel, configs["unet"], unet, UNET)
    if "scheduler" not in instead:
        parts["scheduler"] = _scheduler(scheduler, prediction, zero_snr="ztsnr" in header.shapes)
    if dtype == torch.float16:
        for name in configs.keys() - instead.keys():
            refuse_overflow(parts[name], name)
    of = getattr(diffusers, kind)
    takes = inspect.signature(of.__init__).parameters
    pipeline = of(**parts | {name: part for name, part in instead.items() if name in takes})
    pipeline.register_to_config(_name_or_path=str(file))
    return pipeline


def _read(header: Header, prefix: str, dtype: torch.dtype | None, past: str = "-") -> dict[str, torch.Tensor]:
    """The tensors of a component, in `dtype` or that of the file."""
    names = [n for n in header.shapes if n.startswith(prefix) and not n.startswith(past) and not UNUSED.fullmatch(n)]
    if dtype is None:
        float_dtypes({name: (header.dtypes[name], header.shapes[name]) for name in names}, header.file)
    with safe_open(header.file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in names}
    return {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in tensors.items()}


def _fill(header: Header, name: str, kind: Any, config: dict[str, Any], tensors: dict[str, Any], prefix: str) -> Any:
    """A component with weights of the file: all that it has, and of those that begin with `prefix` all are its own."""
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))
    renamed = {plain_name(key): value for key, value in _rename(name, model, tensors, prefix).items()}
    used = {tensor.untyped_storage().data_ptr() for tensor in renamed.values()}
    cut = ("in_proj_weight", "in_proj_bias", "text_projection")  # what is cut or turned has other storage
    unused = [n for n, t in tensors.items() if not n.endswith(cut) and t.untyped_storage().data_ptr() not in used]
    own = {plain_name(key): (key, tensor) for key, tensor in model.state_dict().items()}
    differ = [key for key in own.keys() & renamed.keys() if own[key][1].shape != renamed[key].shape]
    shapes = [f"{key} ({list(renamed[key].shape)}, not {list(own[key][1].shape)})" for key in differ]
    faults = {"lacks": own.keys() - renamed.keys(), "has another shape of": shapes}
    for what, names in (faults | {"also has": unused or renamed.keys() - own.keys()}).items():
        if names:
            raise header.refuse(f"holds no whole {name}: it {what} {listed(names)}; copy it again, or {WHOLE}")
    model.load_state_dict({own[key][0]: tensor for key, tensor in renamed.items()}, assign=True)
    for module in model.modules():
        if "position_ids" in module._buffers:  # computed, and in no state
            module.position_ids = torch.arange(config["max_position_embeddings"])[None]
    return model.eval()


def _rename(name: str, model: Any, tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors by the names that diffusers and transformers give them."""
    if name == "unet":
        return dict(ldm.convert_ldm_unet_checkpoint(tensors, model.config))
    if name == "vae":
        return dict(ldm.convert_ldm_vae_checkpoint(tensors, model.config))
    if prefix.endswith(".model."):
        return dict(ldm.convert_open_clip_checkpoint(model, tensors, prefix))
    return dict(ldm.convert_ldm_clip_checkpoint(tensors))


def make_tokenizer(pad_token: str, length: int) -> Any:
    """CLIP's tokenizer, of the byte-pair merges that OpenAI published.

    Its words are the 256 bytes, the same at the end of a word, each merge's result, and two marks.

    Args:
        length: the most tokens that a text encoder takes.
    """
    lines = gzip.decompress((DATA / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    letters = sorted(ByteLevel.alphabet())
    merges = lines[1 : CLIP_WORDS - 2 - 2 * len(letters) + 1]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    begin, end = "<|startoftext|>", "<|endoftext|>"
    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = {word: number for number, word in enumerate([*words, begin, end])}
        Path(scratch, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(scratch, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        marks = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad_token}
        return transformers.CLIPTokenizer.from_pretrained(scratch, model_max_length=length, **marks)


def _scheduler(name: str, prediction: str, *, zero_snr: bool) -> Any:
    """Of all these models' noise schedule, as their published pipelines have it.

    Args:
        zero_snr: whether the model was trained from pure noise, which its file says.
    """
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return getattr(diffusers, name)(**betas | layout_table("schedulers.json")[name] | more, prediction_type=prediction)


def _prediction(header: Header, layout: Mapping[str, Any]) -> str:
    """`epsilon` or `v_prediction`: what the file says, or the YAML file beside it of the same name; else what it shows.

    What a UNet of Stable Diffusion 2 was trained for shows in the last transformer's first norm, whose biases deviate
    by more than 0.09 in v-prediction: a rule of ComfyUI (comfy/supported_models.py, SD20.model_type).
    """
    said = header.metadata.get("modelspec.prediction_type") or header.metadata.get("modelspec.predict_key")
    beside = header.file.with_suffix(".yaml")
    if beside.is_file():
        found = re.search(r"""^\s*parameterization:\s*["']?(\w+)""", beside.read_text(encoding="utf-8"), re.MULTILINE)
        said = found[1] if found else said
    if said is not None:
        if said not in _PREDICTIONS:
            raise header.refuse(f"says that its model predicts {said!r}: known are {', '.join(_PREDICTIONS)}")
        return _PREDICTIONS[said]
    if "v_pred" in header.shapes:
        return "v_prediction"
    norms = [name for name in header.shapes if re.fullmatch(_LAST_NORM, name)]
    if "v_prediction_pixels" not in layout or not norms or header.shape(UNET + "input_blocks.0.0.weight")[1] != 4:
        return "epsilon"
    last = max(norms, key=lambda name: int(name.removeprefix(UNET).split(".")[1]))
    biases = _read(header, last, torch.float32)[last]
    shown = "v_prediction" if biases.std(correction=0) > 0.09 else "epsilon"
    log.warning(
        "%s does not say what its model predicts: by its weights, %s; say it in %s (parameterization: v or eps)",
        header.file,
        shown,
        beside.name,
    )
    return shown
